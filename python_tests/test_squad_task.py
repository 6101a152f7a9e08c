"""SQuAD from the official JSON to predictions.json: spans of tokens, windows, training, export."""

import json
import lzma
import random

import numpy as np
import pytest
import torch
from corpora import exit_code, small_tokenizer

pytest.importorskip("sklearn", reason="fine-tuning needs the extra 'finetune'")

from metro_ext.finetune import __main__ as command
from metro_ext.finetune import squad
from metro_ext.finetune.span_head import SpanModel, export_span_model, span_loss
from metro_ext.finetune.squad_files import Question, Window, read_questions, windows
from metro_ext.finetune.squad_task import TASKS, best_span
from metro_ext.model import FIRST_POSITION, Packing
from metro_ext.pretrained import load
from metro_ext.text_encoder import EncodedTexts


def document(*paragraphs) -> dict:
    """paragraphs: (context, [(id, question, answer or None)])."""
    made = []
    for context, rows in paragraphs:
        qas = [
            {"id": i, "question": q, "is_impossible": a is None,
             "answers": [] if a is None else [{"text": a, "answer_start": context.index(a)}]}
            for i, q, a in rows
        ]  # fmt: skip
        made.append({"context": context, "qas": qas})
    return {"version": "x", "data": [{"title": "t", "paragraphs": made}]}


# Characters and tokens.


def covered(tokenizer, text, start, stop):
    """The text of the smallest run of tokens that covers characters start ... stop - 1."""
    _, spans = tokenizer.encode_with_spans(text)
    places = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < stop)
                            & (spans[:, 1] > spans[:, 0]))  # fmt: skip
    return text[spans[places[0], 0] : spans[places[-1], 1]]


@pytest.mark.parametrize("text, answer", [
    ("in the  year\t1066 , they", "1066"),
    ("Café naïve ﬁne", "ﬁne"),
    ("cafe\u0301 and e\u0301\u0302 x", "e\u0301\u0302"),
    ("a ½ b", "½"),
    ("the 日本語 text", "本"),
    ("so 👩‍👩‍👧‍👦 said", "👩‍👩‍👧‍👦"),
    ("\ufeffzero\u200bwidth Ｆｕｌｌ", "Ｆｕｌｌ"),
    ("▁▁ lower İstanbul ▁", "İstanbul"),
    ("x\U0010fffdy z", "\U0010fffd"),
    ("مرحبا שלום हिन्दी", "שלום"),
])  # fmt: skip
def test_tokens_cover_the_answer_and_no_more(text, answer):
    start = text.index(answer)
    for cased in (False, True):
        assert covered(small_tokenizer(cased=cased), text, start, start + len(answer)) == answer


def test_pieces_of_one_character_share_it():
    tokenizer = small_tokenizer()
    ids, spans = tokenizer.encode_with_spans("a ½日")
    shown = dict(zip(map(tuple, spans.tolist()), tokenizer.pieces(ids), strict=True))
    assert shown == {(0, 1): "▁a", (2, 2): "▁", (2, 3): "<0x32>", (3, 4): "<0xA5>"}
    assert [tuple(span) for span in spans].count((3, 4)) == 3  # bytes of 日


def test_spans_of_every_character():
    tokenizer = small_tokenizer()
    for c in range(1, 0x30000):
        if not 0xD800 <= c < 0xE000:
            ids, spans = tokenizer.encode_with_spans(f"a {chr(c)}b")
            assert spans[0].tolist() == [0, 1] and spans[-1, 1] == 4 and len(spans) == len(ids)
            assert (spans[:, 0] <= spans[:, 1]).all() and (np.diff(spans[:, 0]) >= 0).all()


def test_spans_of_random_strings():
    tokenizer, generator = small_tokenizer(), random.Random(1)
    alphabet = "aAbe  nt.,-'\té\u0301\u200b\u3000ﬁΣ한日👍▁½"
    for _ in range(2000):
        text = "".join(generator.choices(alphabet, k=12))
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == tokenizer.encode(text)
        assert (np.diff(spans[:, 0]) >= 0).all()
        for piece, (start, stop) in zip(tokenizer.pieces(ids), spans, strict=True):
            if piece.isascii() and piece.isalpha():  # a piece of letters, and folded ones of text
                assert piece.lower() == tokenizer.decode(tokenizer.encode(text[start:stop])) or (
                    "ﬁ" in text[start:stop]
                )


# Files.


def test_official_files_plain_and_compressed(tmp_path):
    whole = json.dumps(document(("Rome fell.", [("a", "What?", "Rome"), ("b", "When?", None)])))
    (tmp_path / "plain.json").write_text(whole)
    (tmp_path / "packed.json.xz").write_bytes(lzma.compress(whole.encode()))
    expected = [Question("a", "What?", "Rome fell.", ((0, "Rome"),)),
                Question("b", "When?", "Rome fell.", ())]  # fmt: skip
    assert read_questions(tmp_path / "plain.json") == expected
    assert read_questions(tmp_path / "packed.json.xz") == expected


def broken(change):
    made = document(("Rome fell.", [("q7", "What?", "Rome")]))
    change(made["data"][0]["paragraphs"][0])
    return json.dumps(made)


@pytest.mark.parametrize("text, words", [
    (broken(lambda p: p["qas"][0]["answers"][0].update(text="Oslo")),
     "question q7: expected the answer 'Oslo' at character 0 of its context, found 'Rome'"),
    (broken(lambda p: p["qas"][0]["answers"][0].update(answer_start=-10)),
     "question q7: expected the answer 'Rome' at character -10"),
    (broken(lambda p: p["qas"][0]["answers"][0].pop("answer_start")),
     "question q7: expected a field 'answer_start', found text"),
    (broken(lambda p: p["qas"][0].update(id=3)),
     "data[0].paragraphs[0].qas[0]: field 'id': expected text, found 3"),
    (broken(lambda p: p["qas"].append(p["qas"][0])),
     "question q7: expected each id once, found twice"),
    (broken(lambda p: p.pop("context")),
     "data[0].paragraphs[0]: expected a field 'context', found qas"),
    (broken(lambda p: p["qas"].clear()), "expected questions, found none"),
    ("[]", "the document: expected an object, found []"),
    ("{", "expected a JSON document"),
])  # fmt: skip
def test_wrong_files_name_file_and_question(text, words, tmp_path):
    path = tmp_path / "train-v1.1.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_questions(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_damaged_compression_and_missing_files(tmp_path):
    (tmp_path / "dev-v1.1.json.xz").write_bytes(lzma.compress(b"{}" * 99)[:-20])
    with pytest.raises(ValueError, match=r"dev-v1\.1\.json\.xz: the compressed file is damaged"):
        TASKS["squad1"].load(tmp_path, "dev")
    with pytest.raises(ValueError, match=r"train-v1\.1\.json: there is no such file"):
        TASKS["squad1"].load(tmp_path, "train")


def test_squad1_wants_answers(tmp_path):
    (tmp_path / "train-v1.1.json").write_text(json.dumps(document(("C.", [("q", "?", None)]))))
    with pytest.raises(ValueError, match=r"question q: expected an answer, found none.*squad2"):
        TASKS["squad1"].load(tmp_path, "train")


# Windows.


def test_windows_overlap_and_cover_the_context():
    tokenizer = small_tokenizer()
    context = " ".join(f"word{i}" for i in range(40))
    question = Question("q", "Which?", context, ((context.index("word20"), "word20"),))
    ids, spans = tokenizer.encode_with_spans(context)
    asked = tokenizer.encode("Which?")
    made = windows(tokenizer, [question], length=40, stride=8)
    starts = []
    for window in made:
        assert len(window.row) <= 40 and window.row[-1] == 2
        assert window.row[: window.first] == [0, *asked, 2, 2]
        start = np.flatnonzero((spans == window.spans[0]).all(1))[0]
        starts.append(start)
        own = window.row[window.first : -1]
        assert own == ids[start : start + len(own)] and len(own) == len(window.spans)
        first, last = window.target(question)
        whole = window.spans[0, 0] <= question.answers[0][0] and (
            window.spans[-1, 1] >= question.answers[0][0] + len("word20")
        )
        assert (first > 0) == whole
        if whole:
            a, b = window.spans[first - window.first, 0], window.spans[last - window.first, 1]
            assert context[a:b] == "word20"
    assert starts == [8 * i for i in range(len(made))] and starts[-1] + len(own) == len(ids)
    # A stride beyond half of what fits is cut to it, so that neighbours share tokens.
    wide = windows(tokenizer, [question], length=40, stride=128)
    assert wide[1].spans[0, 0] < wide[0].spans[-1, 1]


def test_short_and_empty_contexts_and_long_questions():
    tokenizer, empty = small_tokenizer(), Question("b", "?", "", ())
    made = windows(tokenizer, [Question("a", "so " * 200, "Short.", ()), empty], 32, 8)
    assert len(made[0].row) <= 32 and len({window.question for window in made}) == 2
    assert made[-1].spans.shape == (0, 2) and made[-1].target(empty) == (0, 0)
    with pytest.raises(ValueError, match="at least 16 tokens and a stride of at least 1"):
        windows(tokenizer, [], 8, 8)


def test_best_span_by_brute_force():
    generator = np.random.default_rng(0)
    spans = np.array([[0, 2], [2, 2], *([i, i + 1] for i in range(2, 42))])  # one bare space
    window = Window(0, [0] * (5 + len(spans) + 1), 5, spans)
    for _ in range(20):
        logits = generator.normal(size=(len(window.row), 2)).astype(np.float32)
        found = {
            (i, j): logits[5 + i, 0] + logits[5 + j, 1]
            for i in range(len(spans)) for j in range(i, min(i + 30, len(spans)))
            if i != 1 and j != 1
        }  # fmt: skip
        i, j = max(found, key=found.get)
        score, characters = best_span(window, logits)
        assert score == pytest.approx(found[i, j])
        assert characters == slice(spans[i, 0], spans[j, 1])
    logits = np.zeros((len(window.row), 2), np.float32)
    logits[5 + 3, 0] = 5  # the best start and the best end make a span of 31 tokens
    logits[5 + 33, 1] = 5
    logits[5 + 32, 1] = 4  # and 30 are allowed
    assert best_span(window, logits) == (9, slice(spans[3, 0], spans[32, 1]))
    hidden = Window(0, [0] * 7, 5, np.array([[3, 3]]))
    assert best_span(hidden, np.zeros((7, 2), np.float32))[0] == -np.inf


def test_span_loss_is_cross_entropy_within_each_sequence():
    logits = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), requires_grad=True)
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3]) + FIRST_POSITION
    packing = Packing(positions, torch.tensor([0, 3, 7], dtype=torch.int32), 9, torch.tensor(0))
    loss = span_loss(logits, packing, [(1, 2), (0, 0)])
    by_hand = -sum(
        torch.log_softmax(part[:, side], 0)[place]
        for part, span in ((logits[:3], (1, 2)), (logits[3:], (0, 0)))
        for side, place in enumerate(span)
    ) / 4  # fmt: skip
    torch.testing.assert_close(loss, by_hand)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


# The whole way.


def write_toy(folder, version, unanswerable):
    """The answer is the word after "is"; where the question is "no", there is none."""
    words = ["red", "blue", "green", "black", "white", "brown"]
    paragraphs = []
    for i in range(72):
        context = f"{words[i % 5]} is {words[i % 6]}."
        gone = unanswerable and i % 3 == 0
        answer = None if gone else words[i % 6]
        made = document((context, [(f"q{i}", "no ?" if gone else "what ?", None)]))
        question = made["data"][0]["paragraphs"][0]["qas"][0]
        if answer:
            question["answers"] = [
                {"text": answer, "answer_start": context.index(f"is {answer}") + 3}
            ]
        paragraphs += made["data"][0]["paragraphs"]
    for part, chosen in (("train", paragraphs), ("dev", paragraphs[::5])):
        whole = {"version": version, "data": [{"title": "t", "paragraphs": chosen}]}
        (folder / f"{part}-v{version}.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("task, epochs, least", [("squad1", 1, 0), ("squad2", 30, 80)])
def test_it_learns_and_writes_official_predictions(task, epochs, least, finished, tmp_path, capsys):
    version = TASKS[task].version
    write_toy(tmp_path, version, task == "squad2")
    out, dev = tmp_path / "out", tmp_path / f"dev-v{version}.json"
    command.main([task, "--model", str(finished), "--data", str(tmp_path), "--seeds", "1",
                  "--epochs", str(epochs), "--lr", "5e-3", "--batch", "24", "--device", "cpu",
                  "--output", str(out)])  # fmt: skip
    (scores,) = json.loads((out / "results.json").read_text())["seeds"][0].values()
    assert scores["f1"] > least
    capsys.readouterr()
    squad.main([str(dev), str(out / "predictions.json")])
    judged = json.loads(capsys.readouterr().out)
    assert judged["f1"] == pytest.approx(scores["f1"])
    assert judged["exact"] == pytest.approx(scores["exact"])
    if task == "squad2":
        threshold = scores["best_f1_thresh"]
        squad.main([str(dev), str(out / "spans.json"), "--na-prob", str(out / "na_prob.json"),
                    "--na-threshold", str(threshold)])  # fmt: skip
        again = json.loads(capsys.readouterr().out)
        assert again == {k: pytest.approx(scores[k]) for k in again}
        assert scores["best_f1"] == pytest.approx(scores["f1"]) and scores["NoAns_f1"] > 50
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MPNetForQuestionAnswering"]


@torch.no_grad()
def test_exported_logits_are_ours(finished, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the judge: extra 'export'")
    pretrained = load(finished)
    model = SpanModel(pretrained, seed=2).eval()
    model.out.weight.normal_(generator=torch.Generator().manual_seed(1))
    export_span_model(model, pretrained.tokenizer, tmp_path / "out")
    judge, info = transformers.AutoModelForQuestionAnswering.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked, contexts = ["Who?", "What was it?"], ["Bo did.", "It was a very long day."]
    questions = [Question(q, q, c, ()) for q, c in zip(asked, contexts, strict=True)]
    rows = [window.row for window in windows(pretrained.tokenizer, questions, 32, 8)]
    batch = tokenizer(asked, contexts, padding=True, return_tensors="pt")
    assert len(rows) == 2 and not batch["attention_mask"].all()
    packed = EncodedTexts.pack(rows, 32)
    ours = model(packed.tokens, packed.packing, torch.float32).split(packed.lengths)
    theirs = judge.eval()(**batch)
    for i, expected in enumerate(ours):
        found = torch.stack([theirs.start_logits[i], theirs.end_logits[i]], 1)[: len(expected)]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options, words", [
    (["squad1", "--submission", "--output", "x"], "SQuAD's test sets are not public"),
    (["cola", "--stride", "8"], "--stride is for squad1 and squad2, not for cola"),
    (["squad1", "--length", "8"], "at least 16 tokens"),
    (["squad1", "--device", "cuda"], "--device is cuda, but torch finds no CUDA device"),
])  # fmt: skip
def test_wrong_options(options, words, finished, tmp_path, capsys):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    write_toy(tmp_path, "1.1", False)
    code = exit_code(command.main, *options, "--model", finished, "--data", tmp_path)
    assert code == 2 and words in capsys.readouterr().err
