import json

import pytest
from corpora import exit_code

from metro_ext.finetune.squad import (
    apply_threshold,
    best_thresholds,
    exact,
    f1,
    main,
    normalise,
    read_answers,
    read_na_probabilities,
    score,
    split_scores,
)


def squad(*questions) -> dict:
    context = "The Normans settled in France."
    qas = []
    for index, texts in questions:
        answers = [{"text": t, "answer_start": context.find(t)} for t in texts]
        qas.append({"id": index, "question": "?", "answers": answers})
    return {"version": "v2.0", "data": [{"paragraphs": [{"context": context, "qas": qas}]}]}


def test_normalisation():
    assert normalise("The  U.S.'s  (an) Answer!") == "uss answer"
    assert normalise("theatre a-b") == "theatre ab"
    assert normalise("the") == ""


def test_figures_by_hand():
    assert exact("The Normans", "normans.") == 1 and exact("Normans", "Norman") == 0
    # One word in common: precision 1/3, recall 1/2.
    assert f1("Normans settled", "Normans of England") == pytest.approx(2 / 5)
    assert f1("", "") == 1 and f1("", "x") == 0 and f1("x", "") == 0
    assert f1("x x y", "x x x") == pytest.approx(2 / 3)


def test_score_of_a_file(tmp_path, capsys):
    path, predictions = tmp_path / "dev.json", tmp_path / "predictions.json"
    path.write_text(
        json.dumps(squad(("a", ["Normans", "The Normans settled"]), ("b", []), ("c", ["France"])))
    )
    assert read_answers(path) == {
        "a": ["Normans", "The Normans settled"], "b": [""], "c": ["France"]}  # fmt: skip
    predictions.write_text(json.dumps({"a": "Normans settled", "b": "", "c": "in France"}))
    main([str(path), str(predictions)])
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] == pytest.approx(200 / 3)
    assert found["f1"] == pytest.approx(100 * (1 + 1 + 2 / 3) / 3)
    assert score(read_answers(path), {"b": "x"}) == {"exact": 0.0, "f1": 0.0}


def test_an_answer_that_is_not_in_its_context(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(squad(("q7", ["Danes"]))))
    with pytest.raises(ValueError, match=r"dev\.json: question q7: expected the answer 'Danes'"):
        read_answers(path)


def test_best_thresholds_by_hand():
    answers = {"a": ["x"], "b": [""], "c": ["y"], "d": [""]}
    found, na = {"a": "x", "b": "z", "c": "y", "d": ""}, {"a": 0.1, "b": 0.4, "c": 0.6, "d": 0.9}
    # None answered: 2 of 4. Up to a: 3; b answered: 2; c: 3, no better than before; d is empty.
    expected = {"best_exact": 75.0, "best_exact_thresh": 0.1,
                "best_f1": 75.0, "best_f1_thresh": 0.1}  # fmt: skip
    assert best_thresholds(answers, found, na) == expected
    final = apply_threshold(found, na, 0.1)
    assert final == {"a": "x", "b": "", "c": "", "d": ""}
    assert split_scores(answers, final) == {
        "exact": 75.0, "f1": 75.0, "HasAns_exact": 50.0, "HasAns_f1": 50.0,
        "NoAns_exact": 100.0, "NoAns_f1": 100.0}  # fmt: skip
    # F1 and exact match part ways: c is half right, and b, between, is not there to cost.
    halves = best_thresholds({**answers, "b": ["z"]}, {**found, "c": "y w"}, na)
    assert halves["best_exact"] == 75.0 and halves["best_exact_thresh"] == 0.4
    assert halves["best_f1"] == pytest.approx(100 * (3 + 2 / 3) / 4)
    assert halves["best_f1_thresh"] == 0.6
    # Nothing is worth answering.
    assert best_thresholds({"b": [""]}, {"b": "z"}, {"b": 0.2})["best_f1_thresh"] == 0.0
    with pytest.raises(ValueError, match="question d: expected a probability"):
        best_thresholds(answers, found, {"a": 0.1, "b": 0.1, "c": 0.1})


@pytest.mark.parametrize("text, words", [
    ("{", "expected a JSON document"),
    ("[]", "predictions.json: expected an object, found []"),
    ('{"q1": 3}', "question q1: expected text, found 3"),
    ('{"q1": null}', "question q1: expected text, found null"),
])  # fmt: skip
def test_malformed_predictions(text, words, tmp_path, capsys):
    data, path = tmp_path / "dev.json", tmp_path / "predictions.json"
    data.write_text(json.dumps(squad(("a", ["Normans"]))))
    path.write_text(text)
    assert exit_code(main, data, path) == 2
    error = capsys.readouterr().err
    assert words in error and str(path) in error


def test_malformed_probabilities(tmp_path, capsys):
    path, data, predictions = (tmp_path / f"{name}.json" for name in ("na", "dev", "found"))
    data.write_text(json.dumps(squad(("a", ["Normans"]), ("b", []))))
    predictions.write_text('{"a": "Normans", "b": ""}')
    path.write_text('{"a": 0.5}')
    assert exit_code(main, data, predictions, "--na-prob", path) == 2
    assert f"{path}: question b: expected a probability" in capsys.readouterr().err
    for text in ('{"q": "x"}', '{"q": NaN}', '{"q": true}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"na\.json: question q: expected a number"):
            read_na_probabilities(path)
