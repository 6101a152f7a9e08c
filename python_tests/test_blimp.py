import json

import pytest
import torch
import torch.nn.functional as F
from corpora import exit_code

from metro_ext import text_encoder
from metro_ext.evaluate import __main__ as command
from metro_ext.evaluate import blimp
from metro_ext.pretrained import load
from metro_ext.text_encoder import EncodedTexts

PAIRS = [
    {"UID": "a", "good": "He opened the door.", "bad": "He opened door the."},
    {"UID": "a", "good": "She went in.", "bad": "In went she."},
    {"UID": "b", "good": "Rain.", "bad": "Rain."},
]


@pytest.fixture(scope="module")
def pretrained(finished):
    found = load(finished)
    with torch.no_grad():  # 20 steps leave RTD near its start: heads that tell something
        found.model.rtd_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return found


@pytest.fixture(scope="module")
def rows(pretrained):
    texts = [pair[key] for pair in PAIRS for key in ("good", "bad")]
    return [[0, *pretrained.tokenizer.encode(text), 2] for text in texts]


@torch.no_grad()
def logits(pretrained, encoder, head, row):
    packed = EncodedTexts.pack([row], 32)
    hidden = encoder(packed.tokens, packed.packing, encoder.table(torch.float32))
    return F.linear(head.transform(hidden), encoder.embeddings.token, head.bias)


def test_scores_are_those_of_one_sentence_at_a_time(pretrained, rows, monkeypatch):
    monkeypatch.setattr(blimp, "by_tokens", lambda rows: text_encoder.by_tokens(rows, 40))
    model, mask = pretrained.model, pretrained.tokenizer.mask_id
    pll = blimp.pseudo_log_likelihoods(pretrained, rows)
    clm = blimp.clm_scores(pretrained, rows)
    rtd = blimp.rtd_scores(pretrained, rows)
    for row, p, c, r in zip(rows, pll, clm, rtd, strict=True):
        expected = 0.0
        for i in range(1, len(row) - 1):
            masked = [*row[:i], mask, *row[i + 1 :]]
            out = logits(pretrained, model.auxiliary, model.auxiliary_head, masked)
            expected += out[i].log_softmax(-1)[row[i]].item()
        assert p == pytest.approx(expected, rel=1e-4)
        out = logits(pretrained, model.main, model.main_head, row).log_softmax(-1)
        assert c == pytest.approx(sum(out[i, row[i]].item() for i in range(1, len(row) - 1)), 1e-4)
        packed = EncodedTexts.pack([row], 32)
        with torch.no_grad():
            head, table = model.rtd_head, model.main.table(torch.float32)
            hidden = head.transform(model.main(packed.tokens, packed.packing, table))
            original = 1 - (hidden @ head.weight + head.bias).sigmoid()
        assert r == pytest.approx(original[1:-1].log().sum().item(), 1e-3, 1e-4)


def test_accuracy_by_hand(pretrained, monkeypatch):
    scores = iter([[3.0, 1.0, 5.0], [2.0, 2.0, 5.0]])  # good, bad: a win, a loss, a tie
    monkeypatch.setattr(blimp, "scorers", lambda _: {"pll": lambda *_: next(scores)})
    found = blimp.blimp(pretrained, PAIRS)
    assert found == {"pll": {"a": 0.5, "b": 0.5, "overall": 0.5}}


def test_heads_decide_which_scores_there_are(pretrained):
    assert set(blimp.scorers(pretrained)) == {"pll", "rtd", "clm"}


def test_command(finished, tmp_path, capsys):
    data = tmp_path / "blimp.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    out = tmp_path / "blimp.json"
    argv = ["blimp", str(finished), "--data", str(data), "--limit", "1", "--output", str(out)]
    command.main(argv)
    assert "overall" in capsys.readouterr().out
    assert set(json.loads(out.read_text())) == {"pll", "rtd", "clm"}
    data.write_text('{"UID": "a", "good": "x"}\n')
    assert exit_code(command.main, "blimp", finished, "--data", data) == 2
    assert "blimp.jsonl: line 1: expected a field 'bad', found UID, good" in capsys.readouterr().err
