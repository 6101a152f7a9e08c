"""BEIR's files, its measures by hand, and the search that reads the corpus in blocks."""

import json
import lzma
import math
import shutil

import pytest
import torch
from corpora import exit_code

from metro_ext import export
from metro_ext.evaluate import __main__ as command
from metro_ext.evaluate import beir, retrieval
from metro_ext.pretrained import load, load_text_encoder

DOCUMENTS = [{"_id": "d1", "title": "Doors", "text": "He opened the door."},
             {"_id": "d2", "title": "", "text": "Rain fell."},
             {"_id": "d3", "text": "She went in.", "metadata": {}}]  # fmt: skip
QUERIES = [{"_id": "q1", "text": "door"}, {"_id": "q2", "text": "rain"},
           {"_id": "not judged", "text": "x"}]  # fmt: skip
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td3\t1", "q2\td2\t1"]


def write(folder, documents=DOCUMENTS, queries=QUERIES, qrels=QRELS, compressed=False):
    (folder / "qrels").mkdir(exist_ok=True)
    texts = {
        "corpus.jsonl": map(json.dumps, documents),
        "queries.jsonl": map(json.dumps, queries),
        "qrels/test.tsv": qrels,
    }
    for name, rows in texts.items():
        data = "".join(f"{row}\n" for row in rows).encode()
        if compressed:
            (folder / f"{name}.xz").write_bytes(lzma.compress(data))
        else:
            (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("compressed", [False, True])
def test_official_format(compressed, tmp_path):
    found = beir.read(write(tmp_path, compressed=compressed), "test")
    assert found.queries == {"q1": "door", "q2": "rain"}
    assert found.relevance == {"q1": {"d1": 2, "d3": 1}, "q2": {"d2": 1}}
    documents = ["Doors He opened the door.", "Rain fell.", "She went in."]
    assert list(found.documents()) == list(zip(["d1", "d2", "d3"], documents, strict=True))


def test_measures_by_hand():
    # Grades of the ranking: 0 2 0 1; the best possible: 2 1.
    first = [("x", 0.9), ("a", 0.8), ("y", 0.7), ("b", 0.6)]
    ndcg = (2 / math.log2(3) + 1 / math.log2(5)) / (2 / 1 + 1 / math.log2(3))
    # The only relevant document at place 12, behind the query itself and ten that are not judged.
    second = [("q2", 9.0), *((f"n{i}", 8 - i / 100) for i in range(11)), ("c", 1.0)]
    relevance = {"q1": {"a": 2, "b": 1, "z": 0}, "q2": {"c": 1, "w": -1}}
    found = retrieval.measures(relevance, {"q1": first, "q2": second})
    assert found == pytest.approx(
        {"ndcg@10": ndcg / 2, "recall@10": (1 + 0) / 2, "recall@100": 1.0, "mrr@10": (1 / 2) / 2}
    )
    # Of equal scores the document of the later id comes first, as in trec_eval.
    tied = retrieval.measures({"q": {"a": 1}}, {"q": [("a", 1.0), ("b", 1.0)]})
    assert tied["mrr@10"] == 0.5
    # A judged query without a relevant document, or without a ranking, counts as 0.
    both = retrieval.measures({"q": {"a": 1}, "r": {"a": 0}, "s": {"a": 1}}, {"q": [("a", 1.0)]})
    assert both["ndcg@10"] == pytest.approx(1 / 3)


def test_search_in_blocks_is_the_search_of_all(monkeypatch):
    monkeypatch.setattr(retrieval, "DEPTH", 4)
    monkeypatch.setattr(retrieval, "QUERIES_PER_BLOCK", 3)
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(n, 8, generator=generator) for n in (7, 50))
    best = retrieval.Best([f"q{i}" for i in range(7)], queries)
    for start in range(0, 50, 6):
        best.add([f"d{i}" for i in range(50)[start : start + 6]], documents[start : start + 6])
        assert len(best.names) <= 7 * 5  # of the kept ones only, however large the corpus
    expected = (queries @ documents.T).topk(5)
    for i, ranking in enumerate(best.rankings().values()):
        assert [name for name, _ in ranking] == [f"d{j}" for j in expected.indices[i].tolist()]
        torch.testing.assert_close(torch.tensor([s for _, s in ranking]), expected.values[i])
    best.add(["d7"], documents[7:8] + 1e3)
    best.add(["d7"], documents[7:8] + 1e3)
    with pytest.raises(ValueError, match="expected each document's _id once, found 'd7' twice"):
        best.rankings()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, finished):
    out = tmp_path_factory.mktemp("export") / "whole"
    export.main([str(finished), str(out)])
    return out


def test_command_on_a_run_and_on_its_export(finished, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(retrieval, "DOCUMENTS_PER_BLOCK", 2)
    write(tmp_path)
    found = []
    for model in (finished, exported):
        out = tmp_path / "found.json"
        command.main(["retrieval", str(model), "--data", str(tmp_path), "--output", str(out)])
        found.append(json.loads(out.read_text()))
    assert "2 queries of" in capsys.readouterr().out
    assert found[0] == found[1] and found[0]["recall@100"] == 1.0
    texts = load(finished).texts
    similar = texts.embed(["door", "rain"]) @ texts.embed(
        ["Doors He opened the door.", "Rain fell.", "She went in."]
    ).T  # fmt: skip
    first = 1 / (1 + min((similar[0] > similar[0, i]).sum().item() for i in (0, 2)))
    second = 1 / (1 + (similar[1] > similar[1, 1]).sum().item())
    assert found[0]["mrr@10"] == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("change, words", [
    ({"documents": [{"_id": "d1", "title": "t"}]}, "corpus.jsonl: line 1: expected a field 'text'"),
    ({"documents": [{"_id": 1, "text": "t"}]},
     "corpus.jsonl: line 1: field '_id': expected text, found 1"),
    ({"documents": []}, "corpus.jsonl: expected documents, found none"),
    ({"documents": [{"_id": "d9", "text": "t"}]}, "found none of them there ('d1', for one)"),
    ({"queries": [QUERIES[0], QUERIES[0]]}, "queries.jsonl: line 2: expected each _id once"),
    ({"qrels": [*QRELS, "q9\td1\t1"]}, "test.tsv: line 5: expected a query of"),
    ({"qrels": ["q1\td1\t2", *QRELS]}, "test.tsv: line 1: expected a column 'query-id'"),
    ({"qrels": [QRELS[0], "q1\td1\tx"]}, "line 2: expected a whole number as score, found 'x'"),
    ({"qrels": [*QRELS, QRELS[1]]}, "line 5: expected one judgement of 'd1' for 'q1'"),
    ({"qrels": QRELS[:1]}, "test.tsv: expected judgements, found none"),
    ({"qrels": [QRELS[0], "q1 d1 1"]}, "line 2: expected 3 columns"),
])  # fmt: skip
def test_wrong_data(change, words, finished, tmp_path, capsys):
    write(tmp_path, **change)
    assert exit_code(command.main, "retrieval", finished, "--data", tmp_path) == 2
    assert words in capsys.readouterr().err


def test_judged_documents_that_are_not_there_are_counted(finished, tmp_path):
    collection = beir.read(write(tmp_path, documents=DOCUMENTS[1:]), "test")
    found = retrieval.evaluate(load(finished).texts, collection)
    assert found["judged_missing"] == 1 and found["recall@100"] == (1 / 2 + 1) / 2


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "tokenizer.model").unlink(), "expected the sentencepiece model"),
    (lambda f: (f / "model.safetensors").unlink(), "expected model.safetensors"),
    (lambda f: edit(f, vocab_size=500), "500 entries, the tokenizer 400: it is another tokenizer"),
    (lambda f: edit(f, hidden_size=64), "must have shape [400, 64], found [400, 32]"),
    (lambda f: edit(f, hidden_size="32"), "field 'hidden_size': expected a whole number"),
])  # fmt: skip
def test_exports_that_do_not_fit_together(change, words, exported, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(exported, bad)
    change(bad)
    with pytest.raises(ValueError) as error:
        load_text_encoder(bad)
    assert words in str(error.value)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
