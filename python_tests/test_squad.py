import json

import pytest

from metro_ext.finetune.squad import exact, f1, main, normalise, read_answers, score


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
