"""Sentence vectors: pooling, contrastive loss, pairs, what sentence-transformers makes of them."""

import json
import lzma

import pytest
import torch
import torch.nn.functional as F
from corpora import exit_code

pytest.importorskip("sklearn", reason="fine-tuning needs the extra 'finetune'")

import metro_ext
from metro_ext import export, text_encoder
from metro_ext.finetune import __main__ as command
from metro_ext.finetune.embed import Judges, info_nce, numbered
from metro_ext.finetune.pairs import Pair, find_pairs, read_pairs, read_scored
from metro_ext.pretrained import load_text_encoder
from metro_ext.text_encoder import sentence_vectors

TEXTS = ["He opened the door.", "Rain.", "", "It was the best of times, it was the worst of times"]
SCORED = ["sentence1\tsentence2\tscore", "A.\tB.\t3.8"]


def test_vectors_are_the_means_of_the_hidden_states(finished, monkeypatch):
    pretrained = metro_ext.load(finished)
    expected = torch.stack(
        [F.normalize(hidden.mean(0), dim=0) for hidden in pretrained.hidden_states(TEXTS)]
    )
    torch.testing.assert_close(pretrained.embed(TEXTS), expected)
    one_by_one = torch.cat([pretrained.embed(text) for text in TEXTS])
    torch.testing.assert_close(one_by_one, expected)
    monkeypatch.setattr(text_encoder.by_tokens, "__defaults__", (20,))  # in several batches
    torch.testing.assert_close(pretrained.embed(TEXTS), expected)
    assert pretrained.embed([]).shape == (0, 32)


def test_gradient_of_the_pooled_vectors():
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    lengths = type("P", (), {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)})
    weight = torch.randn(2, 3)
    (found,) = torch.autograd.grad((sentence_vectors(hidden, lengths) * weight).sum(), hidden)
    by_hand = torch.stack([hidden[:2].mean(0), hidden[2:].mean(0)])
    by_hand = (by_hand / by_hand.norm(dim=1, keepdim=True) * weight).sum()
    (expected,) = torch.autograd.grad(by_hand, hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_info_nce_by_hand():
    vectors = F.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    # Three examples, of which the second has a hard negative; the third's positive is the first's.
    examples = [(0, 1), (2, 3, 4), (5, 1)]
    anchors, candidates = vectors[[0, 2, 5]], vectors[[1, 3, 6, 4]]
    scores = (anchors @ candidates.T / 0.1).double()
    rows = [scores[0, [0, 1, 3]], scores[1, [1, 0, 2, 3]], scores[2, [2, 1, 3]]]
    expected = -sum(row.log_softmax(0)[0] for row in rows).float() / 3
    torch.testing.assert_close(info_nce(vectors, examples, 0.1), expected)
    # The second example's negative is the first one's anchor: no negative for that one.
    scores = scores.float()
    rows = [scores[0, [0, 1, 2]], scores[1, [1, 0, 2, 3]], scores[2, [2, 0, 1, 3]]]
    expected = -sum(row.log_softmax(0)[0] for row in rows) / 3
    torch.testing.assert_close(info_nce(vectors, [(0, 1), (2, 3, 0), (5, 6)], 0.1), expected)


def test_equal_texts_have_equal_numbers():
    made = numbered([Pair("a", "b"), Pair("c", "b", "a"), Pair("b", "d", "e")])
    assert made == [(0, 1), (2, 1, 0), (1, 3, 4)]


@pytest.mark.parametrize("name, lines", [
    ("train.jsonl", ['{"anchor": "a", "positive": "b"}', '["c", "d", "e"]']),
    ("train.tsv", ["anchor\tpositive\tnegative", "a\tb\t", "c\td\te"]),
])  # fmt: skip
@pytest.mark.parametrize("compressed", [False, True])
def test_pairs(name, lines, compressed, tmp_path):
    data = "".join(f"{line}\n" for line in lines).encode()
    path = tmp_path / (f"{name}.xz" if compressed else name)
    path.write_bytes(lzma.compress(data) if compressed else data)
    assert find_pairs(tmp_path) == path
    assert read_pairs(path) == [Pair("a", "b"), Pair("c", "d", "e")]


@pytest.mark.parametrize("name, lines, words", [
    ("train.jsonl", ['{"anchor": "a"}'], "line 1: expected a field 'positive', found anchor"),
    ("train.jsonl", ['["a", "b"]', '["a"]'], "line 2: expected a list of 2 or 3 texts, found 1"),
    ("train.jsonl", ['["a", 3]'], "line 1: expected text, found 3"),
    ("train.jsonl", ['["a", " "]'], "line 1: expected some text as positive, found none"),
    ("train.jsonl", ["3"], "line 1: expected an object, found 3"),
    ("train.jsonl", [""], "expected pairs of texts, found none"),
    ("train.tsv", ["anchor\tother", "a\tb"], "line 1: expected a column 'positive'"),
    ("train.tsv", ["anchor\tpositive", "a"], "line 2: expected 2 columns"),
])  # fmt: skip
def test_wrong_pairs(name, lines, words, tmp_path):
    (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError) as error:
        read_pairs(find_pairs(tmp_path))
    assert words in str(error.value) and name in str(error.value)


def test_wrong_scores_and_nothing_to_judge_by(tmp_path):
    with pytest.raises(ValueError, match=r"expected dev\.tsv .* found neither"):
        Judges.of(tmp_path)
    path = tmp_path / "dev.tsv"
    path.write_text("\n".join([*SCORED, "A.\tB.\t9"]))
    with pytest.raises(ValueError, match=r"line 3: expected a score from 0 to 5, found '9'"):
        Judges.of(tmp_path)
    path.write_text(SCORED[0])
    with pytest.raises(ValueError, match=r"dev\.tsv: expected scored pairs of texts, found none"):
        read_scored(path)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, finished):
    """Sentences belong together where they share a colour."""
    folder = tmp_path_factory.mktemp("pairs")
    colours = ["red", "blue", "green", "black", "white", "brown"]
    pairs = [
        {"anchor": f"{colour} {i}", "positive": f"so {colour}", "negative": f"so {other} {i}"}
        for i in range(8) for colour, other in zip(colours, colours[1:] + colours, strict=False)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = [f"{a} {i}\tso {b}\t{5 * (a == b)}" for i in range(2) for a in colours for b in colours]
    (folder / "dev.tsv").write_text("\n".join([SCORED[0], *rows]))
    documents = [{"_id": colour, "text": f"so {colour}"} for colour in colours]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    queries = [{"_id": f"q-{colour}", "text": f"{colour} 9"} for colour in colours]
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    (folder / "qrels").mkdir()
    grades = [f"q-{colour}\t{colour}\t1" for colour in colours]
    (folder / "qrels" / "dev.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *grades]))
    command.main(["embed", "--model", str(finished), "--data", str(folder), "--seeds", "1",
                  "--epochs", "20", "--lr", "3e-3", "--batch", "24", "--device", "cpu",
                  "--temperature", "0.1", "--output", str(folder / "out")])  # fmt: skip
    return folder / "out"


def test_it_learns(tuned):
    (scores,) = json.loads((tuned / "results.json").read_text())["seeds"]
    assert list(scores) == ["dev.tsv", "qrels/dev.tsv"]
    assert scores["dev.tsv"]["spearman"] > 0.5  # at most 0.65, as most scores are tied
    assert scores["qrels/dev.tsv"]["mrr@10"] > 0.8


def test_sentence_transformers_gives_our_vectors(tuned):
    library = pytest.importorskip("sentence_transformers", reason="the judge of the export")
    judge = library.SentenceTransformer(str(tuned), device="cpu")
    ours = load_text_encoder(tuned).embed(TEXTS)
    theirs = torch.from_numpy(judge.encode(TEXTS))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert theirs.shape == (len(TEXTS), 32) and judge.max_seq_length == 32
    assert (ours[0] @ ours[1]).item() == pytest.approx(judge.similarity(*theirs[:2]).item(), 1e-4)


def test_a_pretrained_run_exports_for_sentence_transformers_too(finished, tmp_path, capsys):
    out = tmp_path / "out"
    export.main([str(finished), str(out), "--sentence"])
    modules = json.loads((out / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    torch.testing.assert_close(
        load_text_encoder(out).embed(TEXTS), metro_ext.load(finished).embed(TEXTS)
    )
    options = ["--sentence", "--network", "auxiliary"]
    assert exit_code(export.main, finished, tmp_path / "aux", *options) == 2
    assert "--sentence is for the main network" in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    (["cola", "--temperature", "1"], "--temperature is for embed, not for cola"),
    (["embed", "--temperature", "0"], "--temperature must be above 0"),
    (["embed", "--submission", "--output", "x"], "embed has no test set"),
])  # fmt: skip
def test_wrong_options(options, words, finished, tmp_path, capsys):
    code = exit_code(command.main, *options, "--model", finished, "--data", tmp_path)
    assert code == 2 and words in capsys.readouterr().err
