"""ReCoRD: the official file, the official metric by hand, ranking, what the server takes."""

import copy
import json
import lzma

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="fine-tuning needs the extra 'finetune'")

from metro_ext.finetune import __main__ as command
from metro_ext.finetune.record import (
    CANDIDATES,
    Query,
    Record,
    Rows,
    f1,
    first_of_group_loss,
    read_queries,
    score,
)
from metro_ext.pretrained import load

TEXT = "Ann met Bo in Rome.\n@highlight\nAnn had flown to Rome."
# Both ends of a span are part of it.
ENTITIES = [{"start": 0, "end": 2}, {"start": 8, "end": 9}, {"start": 14, "end": 17},
            {"start": 31, "end": 33}]  # fmt: skip
RECORD = {
    "source": "Daily mail", "idx": 5,
    "passage": {"text": TEXT, "entities": ENTITIES},
    "qas": [
        {"query": "@placeholder came by plane.", "idx": 8,
         "answers": [{"start": 0, "end": 2, "text": "Ann"},
                     {"start": 31, "end": 33, "text": "Ann"}]},
        {"query": "They were in @placeholder.", "idx": 9,
         "answers": [{"start": 14, "end": 17, "text": "Rome"}]},
    ],
}  # fmt: skip


def write(path, *records):
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


@pytest.mark.parametrize("name", ["val.jsonl", "val.jsonl.xz"])
def test_official_format(name, tmp_path):
    first, second = read_queries(write(tmp_path / name, RECORD))
    entities = ("Ann", "Bo", "Rome")
    assert first == Query(8, TEXT, "@placeholder came by plane.", entities, ("Ann",))
    assert second == Query(9, TEXT, "They were in @placeholder.", entities, ("Rome",))


def test_a_test_file_has_no_answers(tmp_path):
    record = copy.deepcopy(RECORD)
    for asked in record["qas"]:
        del asked["answers"]
    path = write(tmp_path / "test.jsonl", record)
    assert [query.answers for query in read_queries(path, labelled=False)] == [(), ()]
    with pytest.raises(ValueError, match=r"test\.jsonl: line 1: expected a field 'answers'"):
        read_queries(path)


@pytest.mark.parametrize("change, words", [
    (lambda r: r["passage"]["entities"].append({"start": 50, "end": 54}),
     "expected characters of the passage, 0 to 52, found 50 to 54"),
    (lambda r: r["passage"]["entities"].clear(), "expected entities of the passage, found none"),
    (lambda r: r["qas"][1]["answers"][0].update(text="Oslo"),
     "query 9: expected the answer 'Oslo' at characters 14 to 17 of its passage, found 'Rome'"),
    (lambda r: r["qas"][0].update(query="No gap."), "query 8: expected @placeholder"),
    (lambda r: r["qas"][0].update(idx="8"), "field 'idx': expected a whole number, found \"8\""),
    (lambda r: r["qas"][1]["answers"].clear(), "query 9: expected answers, found none"),
])  # fmt: skip
def test_wrong_data_names_file_and_line(change, words, tmp_path):
    wrong = copy.deepcopy(RECORD)
    change(wrong)
    with pytest.raises(ValueError) as error:
        read_queries(write(tmp_path / "train.jsonl", RECORD, wrong))
    assert words in str(error.value) and "train.jsonl: line 2: " in str(error.value)


def test_metric_by_hand():
    queries = [Query(0, "", "", (), ("The White House", "White House staff")),
               Query(1, "", "", (), ("Bo",)), Query(2, "", "", (), ("Ann",))]  # fmt: skip
    # Exact after normalisation; one word of two right: precision 1/2, recall 1; nothing right.
    found = ["white house!", "Bo Derek", "Rome"]
    assert score(queries, found) == pytest.approx(
        {"f1": 100 * (1 + 2 / 3 + 0) / 3, "exact": 100 / 3}
    )
    # Nothing is left of either: equal, but no word in common.
    assert f1("The", "a") == 0 and f1("x", "") == 0


def test_training_groups_put_a_right_entity_first(finished):
    tokenizer = load(finished).tokenizer
    entities = tuple("abcdefgh")
    query = Query(0, "p @highlight q", "is @placeholder it", entities, ("c", "e", "z"))
    lost = Query(1, "p", "@placeholder", ("a",), ("z",))  # no entity is right
    rows, seen = Rows(tokenizer, 32), set()
    passage = tokenizer.encode("p q")
    for seed in range(8):
        (group,) = rows.training([query, lost], seed)
        made = {
            tuple([0, *passage, 2, 2, *tokenizer.encode(f"is {entity} it"), 2]): entity
            for entity in entities
        }
        names = [made[tuple(row)] for row in group]
        assert len(set(names)) == CANDIDATES and names[0] in "ce" and not set(names[1:]) & set("ce")
        seen |= set(names)
    assert len(seen) == len(entities)
    with pytest.raises(ValueError, match="whose answer is an entity of its passage"):
        rows.training([lost], 0)


def test_loss_is_the_cross_entropy_of_the_first():
    scores = torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0], requires_grad=True)
    loss = first_of_group_loss(scores, [2, 1, 2])
    groups = scores.split([2, 1, 2])
    torch.testing.assert_close(loss, -sum(g.log_softmax(0)[0] for g in groups) / 3)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all() and gradient[2] == 0


def test_it_learns_and_writes_the_submission(finished, tmp_path):
    names = ["red", "blue", "green"]
    folder = tmp_path / "ReCoRD"
    folder.mkdir()
    records = []
    for i in range(48):
        text = " ".join(names[i % 3 :] + names[: i % 3])  # the answer is always "blue"
        spans = {name: (text.index(name), text.index(name) + len(name) - 1) for name in names}
        entities = [{"start": a, "end": b} for a, b in spans.values()]
        answer = dict(zip(("start", "end"), spans["blue"], strict=True)) | {"text": "blue"}
        asked = {"query": "it is @placeholder", "idx": i, "answers": [answer]}
        passage = {"text": text, "entities": entities}
        records.append({"idx": i, "source": "x", "qas": [asked], "passage": passage})
    write(folder / "train.jsonl", *records)
    write(folder / "val.jsonl", *records[:9])
    write(folder / "test.jsonl", *records[:3])
    command.main(["record", "--model", str(finished), "--data", str(tmp_path), "--seeds", "1",
                  "--epochs", "10", "--lr", "5e-3", "--batch", "16", "--device", "cpu",
                  "--output", str(tmp_path / "out"), "--submission"])  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["summary"]["val.jsonl f1"]["median"] > 80
    lines = (tmp_path / "out" / "ReCoRD.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["idx"] for row in found] == [0, 1, 2]
    assert all(row["label"] == "blue" for row in found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["MPNetForSequenceClassification"]


def test_answers_are_the_highest_of_each_query(monkeypatch):
    queries = [Query(0, "p", "@placeholder", ("a", "b"), ()),
               Query(1, "p", "@placeholder", ("c", "d", "e"), ())]  # fmt: skip
    from metro_ext.finetune import record

    monkeypatch.setattr(record, "Rows", lambda *_: type("R", (), {"of": lambda s, q, c: c})())
    monkeypatch.setattr(record, "predict", lambda *_: np.array([[1.0], [2], [3], [9], [4]]))
    job = type("J", (), {"pretrained": type("P", (), {"tokenizer": None}), "length": 8,
                         "settings": type("S", (), {"dtype": None})})  # fmt: skip
    assert Record().answers(job, None, queries) == ["b", "d"]
