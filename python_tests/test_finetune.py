"""Loaders on files in the official format, metrics by hand, training, submissions, export."""

import json
import lzma

import numpy as np
import pytest
import torch
from corpora import exit_code

pytest.importorskip("sklearn", reason="fine-tuning needs the extra 'finetune'")

from metro_ext.finetune import __main__ as command
from metro_ext.finetune import metrics
from metro_ext.finetune.examples import Example
from metro_ext.finetune.heads import Classifier, encode
from metro_ext.finetune.loop import Settings, defaults, depth_groups
from metro_ext.finetune.submission import write_submission
from metro_ext.finetune.tasks import TASKS
from metro_ext.pretrained import load
from metro_ext.text_encoder import EncodedTexts

MNLI_HEADER = [
    "index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
    "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label",
]  # fmt: skip
STSB_HEADER = [
    "index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1",
    "sentence2", "score",
]  # fmt: skip
MRPC_HEADER = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
COPA = {"premise": "It rained.", "choice1": "It was dry.", "choice2": "It was wet.",
        "question": "effect", "label": 1, "idx": 4}  # fmt: skip
ANSWERS = [{"text": "yes", "label": 1, "idx": 0}, {"text": "no", "label": 0, "idx": 1}]
MULTIRC = {"idx": 3, "passage": {"text": "A text.", "questions": [
    {"question": "Is it?", "idx": 9, "answers": ANSWERS}]}}  # fmt: skip
WIC = {"word": "bed", "sentence1": "A bed.", "sentence2": "A river bed.", "label": False, "idx": 2,
       "start1": 2, "end1": 5, "start2": 8, "end2": 11}  # fmt: skip
WSC = {"text": "Ann told Bo that she won.", "label": True, "idx": 0, "target": {
    "span1_text": "Ann", "span1_index": 0, "span2_text": "she", "span2_index": 4}}  # fmt: skip
BOOLQ = {"question": "is it", "passage": "It is.", "idx": 7, "label": True}
CB = {"premise": "P.", "hypothesis": "H.", "label": "neutral", "idx": 1}

# task, lines of the file, the example that they give
FORMATS = [
    ("cola", ["gj04\t0\t*\tThey is."], Example("They is.", None, 0, 0)),
    ("sst-2", ["sentence\tlabel", '"quoted \t1'], Example('"quoted ', None, 1, 0)),
    ("mrpc", ["\ufeff" + "\t".join(MRPC_HEADER), "1\t70\t71\tA.\tB."], Example("A.", "B.", 1, 0)),
    ("sts-b", ["\t".join(STSB_HEADER), "5\tg\tf\ty\t1\ts\ts\tA.\tB.\t3.800"],
     Example("A.", "B.", 3.8, "5")),
    ("qqp", ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "8\t1\t2\tA?\tB?\t0"],
     Example("A?", "B?", 0, "8")),
    ("mnli", ["\t".join(MNLI_HEADER), "\t".join(["6", *"abcdefg", "A.", "B.", "x", "neutral"])],
     Example("A.", "B.", 2, "6")),
    ("qnli", ["index\tquestion\tsentence\tlabel", "3\tA?\tB.\tnot_entailment"],
     Example("A?", "B.", 1, "3")),
    ("rte", ["index\tsentence1\tsentence2\tlabel", "3\tA.\tB.\tentailment"],
     Example("A.", "B.", 0, "3")),
    ("wnli", ["index\tsentence1\tsentence2\tlabel", "3\tA.\tB.\t1"], Example("A.", "B.", 1, "3")),
    ("boolq", [BOOLQ], Example("It is.", "is it", 1, 7)),
    ("cb", [CB], Example("P.", "H.", 2, 1)),
    ("copa", [COPA], Example("It rained. so", "It was dry.", 0, 0, 4)),
    ("multirc", [MULTIRC], Example("A text.", "Is it? yes", 1, 0, (3, 9))),
    ("super-rte", [{**CB, "label": "not_entailment"}], Example("P.", "H.", 1, 1)),
    ("wic", [WIC], Example("bed: A bed.", "A river bed.", 0, 2)),
    ("wsc", [WSC], Example("Ann told Bo that * she * won.", "Ann", 1, 0)),
]  # fmt: skip


def write(folder, task, rows, name=None, compressed=False):
    folder = folder / TASKS[task].folder
    folder.mkdir(exist_ok=True)
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / (name or TASKS[task].train)
    data = ("\n".join(texts) + "\n").encode()
    if compressed:
        path, data = path.with_name(path.name + ".xz"), lzma.compress(data)
    path.write_bytes(data)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("task, rows, expected", FORMATS, ids=[f[0] for f in FORMATS])
def test_official_formats(task, rows, expected, compressed, tmp_path):
    write(tmp_path, task, rows, compressed=compressed)
    examples = TASKS[task].load(tmp_path, TASKS[task].train)
    assert examples[0] == expected
    assert len(examples) == (2 if task in ("copa", "multirc") else 1)


def test_every_task_has_its_format_tested():
    assert {f[0] for f in FORMATS} == set(TASKS)


@pytest.mark.parametrize("task, rows, words", [
    ("sst-2", ["sentence\tlbl", "a\t1"], "line 1: expected a column 'label', found sentence, lbl"),
    ("sst-2", ["sentence\tlabel", "a\t1", "b\t2"], "line 3: expected a label of 0, 1, found '2'"),
    ("sst-2", ["sentence\tlabel", "a"], "line 2: expected 2 columns (sentence, label), found 1"),
    ("sst-2", ["sentence\tlabel"], "expected examples of sst-2, found none"),
    ("sts-b", ["\t".join(STSB_HEADER), "5\tg\tf\ty\t1\ts\ts\tA.\tB.\tx"],
     "line 2: expected a score from 0 to 5, found 'x'"),
    ("sts-b", ["\t".join(STSB_HEADER), "5\tg\tf\ty\t1\ts\ts\tA.\tB.\t7"],
     "line 2: expected a score from 0 to 5, found '7'"),
    ("mrpc", ["\t".join(MRPC_HEADER[:-1])], "line 1: expected a column '#2 String', found Quality"),
    ("cola", ["gj04\t2\t*\tThey is."], "line 1: expected a label of 0, 1, found '2'"),
    ("cb", [CB, "{no"], "line 2: expected JSON ("),
    ("cb", [CB, [1]], "line 2: expected an object, found [1]"),
    ("boolq", [{**BOOLQ, "passage": 3}], "line 1: field 'passage': expected text, found 3"),
    ("wic", [{k: v for k, v in WIC.items() if k != "word"}], "line 1: expected a field 'word'"),
    ("multirc", [{"idx": 3, "passage": {"text": "A.", "questions": [
        {"question": "?", "idx": 9, "answers": [{"text": "yes", "label": 1}]}]}}],
     "line 1: expected a field 'idx', found label, text"),
    ("multirc", [{"idx": 3, "passage": {"text": "A.", "questions": [{"question": "?"}]}}],
     "line 1: expected a field 'idx', found question"),
    ("cb", [{"premise": "P.", "label": "neutral"}], "line 1: expected a field 'hypothesis', found"),
    ("cb", [{**CB, "label": "maybe"}], "expected a label of contradiction, entailment, neutral"),
    ("copa", [{**COPA, "question": "why"}], "expected a question of cause, effect, found 'why'"),
    ("wsc", [{**WSC, "target": {**WSC["target"], "span2_index": 1}}],
     "line 1: expected 'she' at word 1, found 'told'"),
])  # fmt: skip
def test_wrong_data_names_file_line_and_what_was_expected(task, rows, words, tmp_path):
    write(tmp_path, task, rows)
    with pytest.raises(ValueError) as error:
        TASKS[task].load(tmp_path, TASKS[task].train)
    assert words in str(error.value) and TASKS[task].train in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"there is no such file, nor train\.tsv\.xz"):
        TASKS["cola"].load(tmp_path, "train.tsv")


def test_metrics_by_hand():
    # Two true positives, one false, one missed, one true negative.
    truth, found = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert metrics.accuracy_and_f1(truth, found) == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    # (tp tn - fp fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) = (2 - 1) / sqrt(3 * 3 * 2 * 2)
    assert metrics.matthews(truth, found)["mcc"] == pytest.approx(1 / 6)
    assert metrics.matthews(truth, [1] * 5)["mcc"] == 0.0
    # F1 of the three labels: 1, 2/3, 0.
    macro = metrics.accuracy_and_macro_f1([0, 1, 2], [0, 1, 1])
    assert macro["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    # Ranks equal: Spearman 1. Pearson: cov 3 over sqrt(2 * 14/3) for (1, 2, 3), (1, 2, 4).
    both = metrics.correlations([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    assert both["spearman"] == pytest.approx(1) and both["pearson"] == pytest.approx(
        3 / (2 * 14 / 3) ** 0.5
    )
    assert metrics.correlations([1.0, 2.0], [3.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    # Question a right in both answers, b in one of two; answers: tp 1, fp 1, fn 0.
    scores = metrics.f1a_and_em(["a", "a", "b", "b"], [1, 0, 0, 0], [1, 0, 1, 0])
    assert scores == pytest.approx({"f1a": 2 / 3, "em": 0.5})


def test_copa_takes_the_likelier_choice():
    examples = [Example("p", str(i), i % 2, i % 2, i // 2) for i in range(4)]
    out = np.array([[0, 1.0], [0, 2.0], [3, 0.0], [5, 0.0]])
    assert TASKS["copa"].score(examples, out) == {"accuracy": 0.5}


def test_defaults_are_the_published_ones():
    assert defaults("mnli", False, 768) == Settings(epochs=2, batch=32, lr=2e-5)
    assert defaults("cola", True, 768) == Settings(epochs=10, batch=16, lr=2e-5)
    assert defaults("qnli", False, 1024) == Settings(epochs=5, batch=32, lr=1e-5)


def test_pairs_are_cut_at_the_longer_text(finished):
    tokenizer = load(finished).tokenizer
    long = "a long text that goes on and on and on and on and on and on and on and on"
    for text, pair in ((long, "short"), ("short", long), (long, long), (long, None)):
        (row,) = encode(tokenizer, [Example(text, pair, 0, 0)], 20)
        assert len(row) == 20 and row[0] == 0 and row[-1] == 2
        assert row.count(2) == (1 if pair is None else 3)
    (row,) = encode(tokenizer, [Example("short", long, 0, 0)], 20)
    short = tokenizer.encode("short")
    assert row[1 : 1 + len(short)] == short


def test_depth_groups_cover_every_parameter_once(finished):
    model = Classifier(load(finished), 2, seed=1)
    groups = depth_groups(model, 1)
    assert "out.weight" in groups[0] and "encoder.embeddings.token" in groups[2]
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(dict(model.named_parameters()))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, finished):
    """SST-2 made so that one word tells the label."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [f"{'good' if i % 2 else 'bad'} number {i // 2}\t{i % 2}" for i in range(64)]
    write(folder, "sst-2", ["sentence\tlabel", *rows])
    write(folder, "sst-2", ["sentence\tlabel", *rows[::3]], "dev.tsv")
    write(folder, "sst-2", ["index\tsentence", "0\tgood", "1\tbad"], "test.tsv")
    command.main(["sst-2", "--model", str(finished), "--data", str(folder), "--seeds", "3",
                  "--epochs", "25", "--lr", "3e-3", "--batch", "16", "--layer-decay", "0.9",
                  "--output", str(folder / "out"), "--submission"])  # fmt: skip
    return folder / "out"


def test_it_learns_and_writes_what_it_found(tuned):
    results = json.loads((tuned / "results.json").read_text())
    row = results["summary"]["dev.tsv accuracy"]
    assert len(results["seeds"]) == 3 and row["min"] <= row["median"] <= row["max"]
    assert row["median"] > 0.9
    assert (tuned / "SST-2.tsv").read_text() == "index\tprediction\n0\t1\n1\t0\n"


@torch.no_grad()
def test_transformers_loads_the_classifier(tuned, finished):
    transformers = pytest.importorskip("transformers", reason="the judge: extra 'export'")
    pipe = transformers.pipeline("text-classification", model=str(tuned))
    assert type(pipe.model).__name__ == "MPNetForSequenceClassification"
    assert [r["label"] for r in pipe(["good number 1", "bad number 1"])] == ["1", "0"]


def test_exported_logits_are_ours(finished, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the judge: extra 'export'")
    from metro_ext.finetune.heads import export_classifier

    pretrained = load(finished)
    model = Classifier(pretrained, 3, seed=2).eval()
    with torch.no_grad():
        model.out.weight.normal_(generator=torch.Generator().manual_seed(1))
        export_classifier(model, pretrained.tokenizer, ("a", "b", "c"), tmp_path / "out")
        judge = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        examples = [Example("One door.", "Two.", 0, 0), Example("Rain.", "It rained.", 0, 1)]
        rows = encode(pretrained.tokenizer, examples, 32)
        packed = EncodedTexts.pack(rows, 32)
        ours = model(packed.tokens, packed.packing, torch.float32, torch.Generator())
        batch = tokenizer(["One door.", "Rain."], ["Two.", "It rained."], padding=True,
                          return_tensors="pt")  # fmt: skip
        torch.testing.assert_close(judge(**batch).logits, ours, atol=1e-5, rtol=0)


def test_submission_files(tmp_path):
    out = np.array([[0.0, 1.0], [2.0, 0.0]])
    multirc = [Example("t", "q", None, i, (3, 9)) for i in range(2)]
    path = write_submission(TASKS["multirc"], multirc, out, tmp_path / "MultiRC.jsonl")
    answers = [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]
    assert json.loads(path.read_text()) == {
        "idx": 3, "passage": {"questions": [{"idx": 9, "answers": answers}]}}  # fmt: skip
    copa = [Example("p", "c", None, i, 4) for i in range(2)]
    path = write_submission(TASKS["copa"], copa, out, tmp_path / "COPA.jsonl")
    assert json.loads(path.read_text()) == {"idx": 4, "label": 0}
    scores = [Example("a", "b", None, "5")]
    path = write_submission(TASKS["sts-b"], scores, np.array([[5.7]]), tmp_path / "STS-B.tsv")
    assert path.read_text() == "index\tprediction\n5\t5.000\n"


def test_diagnostic_sets_are_predicted_where_they_are(tmp_path):
    header = "index\tsentence1\tsentence2"
    for name in TASKS["mnli"].test:
        write(tmp_path, "mnli", [header, "0\tA.\tB."], name)
    assert list(TASKS["mnli"].load_tests(tmp_path)) == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    (tmp_path / "diagnostic").mkdir()
    (tmp_path / "diagnostic" / "diagnostic.tsv").write_text(f"{header}\n4\tC.\tD.\n")
    tests = TASKS["mnli"].load_tests(tmp_path)
    assert tests["AX.tsv"] == [Example("C.", "D.", None, "4")]
    write(tmp_path, "super-rte", [CB], "test.jsonl")
    for name, row in (("AX-b", {"sentence1": "A.", "sentence2": "B."}),
                      ("AX-g", {"premise": "C.", "hypothesis": "D.", "pair_id": 3})):  # fmt: skip
        (tmp_path / name).mkdir()
        row |= {"label": "entailment", "idx": 2}
        data = lzma.compress(json.dumps(row).encode())
        (tmp_path / name / f"{name}.jsonl.xz").write_bytes(data)
    tests = TASKS["super-rte"].load_tests(tmp_path)
    assert list(tests) == ["RTE.jsonl", "AX-b.jsonl", "AX-g.jsonl"]
    assert tests["AX-b.jsonl"] == [Example("A.", "B.", None, 2)]
    assert tests["AX-g.jsonl"] == [Example("C.", "D.", None, 2)]
    out = np.array([[1.0, 0.0]])
    path = write_submission(TASKS["super-rte"], tests["AX-g.jsonl"], out, tmp_path / "AX-g.jsonl")
    assert json.loads(path.read_text()) == {"idx": 2, "label": "entailment"}


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--batch", "--lr", "--limit"])
def test_numbers_must_be_above_zero(option, finished, capsys):
    options = ["cola", "--model", finished, "--data", "x", option, "0"]
    assert exit_code(command.main, *options) == 2
    assert f"{option} must be above 0" in capsys.readouterr().err


def test_a_missing_file_is_found_before_training(finished, tmp_path, capsys):
    write(tmp_path, "cola", ["gj04\t0\t*\tThey is."])
    assert exit_code(command.main, "cola", "--model", finished, "--data", tmp_path) == 2
    assert "dev.tsv: there is no such file" in capsys.readouterr().err
    write(tmp_path, "cola", ["gj04\t0\t*\tThey is."], "dev.tsv")
    options = ["--submission", "--output", tmp_path / "out"]
    code = exit_code(command.main, "cola", "--model", finished, "--data", tmp_path, *options)
    assert code == 2
    found = capsys.readouterr()
    assert "test.tsv: there is no such file" in found.err and "step" not in found.out


def test_wrong_options_end_with_code_2(finished, capsys):
    assert exit_code(command.main, "cola", "--model", finished, "--data", "nowhere") == 2
    assert "there is no such file" in capsys.readouterr().err
