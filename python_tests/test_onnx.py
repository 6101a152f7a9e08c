"""ONNX files, judged by onnxruntime against our own hidden states."""

import sys

import numpy as np
import pytest
import torch
from corpora import exit_code

from metro_ext import export, onnx_export
from metro_ext.finetune.heads import Classifier, export_classifier
from metro_ext.finetune.span_head import SpanModel, export_span_model
from metro_ext.pretrained import load

TEXTS = ["He opened the door.", "Rain.", "It was the best of times, it was the worst of times, and"]


def libraries():
    for name in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(name, reason="the extra 'onnx'")
    import onnxruntime

    return onnxruntime


def session(folder):
    path = folder / "onnx" / "model.onnx"
    return libraries().InferenceSession(path, providers=["CPUExecutionProvider"])


def test_hidden_states_are_ours_at_any_batch_and_length(finished, tmp_path, capsys):
    libraries()
    out = tmp_path / "out"
    export.main([str(finished), str(out), "--onnx"])
    assert "ONNX agrees with transformers to" in capsys.readouterr().out
    pretrained, judge = load(finished), session(out)
    expected = pretrained.hidden_states(TEXTS)
    rows = pretrained.texts.rows(TEXTS)
    for row, ours in zip(rows, expected, strict=True):  # one at a time, without padding
        mask = np.ones((1, len(row)), np.int64)
        (found,) = judge.run(None, {"input_ids": np.array([row]), "attention_mask": mask})
        np.testing.assert_allclose(found[0], ours, atol=2e-5)
    longest = max(map(len, rows))
    ids = np.array([row + [1] * (longest - len(row)) for row in rows])
    (found,) = judge.run(None, {"input_ids": ids, "attention_mask": (ids != 1).astype(np.int64)})
    for row, ours in zip(found, expected, strict=True):
        np.testing.assert_allclose(row[: len(ours)], ours, atol=2e-5)
    assert exit_code(onnx_export.main, out) == 2
    assert "onnx: it exists already" in capsys.readouterr().err


@torch.no_grad()
def test_heads_have_their_outputs(finished, tmp_path):
    libraries()
    pretrained = load(finished)
    classifier, spans = Classifier(pretrained, 3, seed=1), SpanModel(pretrained, seed=1)
    export_classifier(classifier, pretrained.tokenizer, ("a", "b", "c"), tmp_path / "classifier")
    export_span_model(spans, pretrained.tokenizer, tmp_path / "spans")
    shapes = {"classifier": [[2, 3]], "spans": [[2, 5], [2, 5]]}
    for name, expected in shapes.items():
        assert onnx_export.write_onnx(tmp_path / name) <= onnx_export.TOLERANCE
        inputs = {"input_ids": np.full((2, 5), 7), "attention_mask": np.ones((2, 5), np.int64)}
        found = session(tmp_path / name).run(None, inputs)
        assert [list(array.shape) for array in found] == expected


def test_a_difference_leaves_nothing(finished, tmp_path, monkeypatch, capsys):
    libraries()
    export.main([str(finished), str(tmp_path / "out")])
    monkeypatch.setattr(onnx_export, "_trace", lambda *_: None)
    monkeypatch.setattr(onnx_export, "_difference", lambda *_: float("nan"))
    before = sorted(tmp_path.rglob("*"))
    assert exit_code(onnx_export.main, tmp_path / "out") == 2
    assert "onnxruntime differs from transformers by nan" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_absent_library_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert exit_code(onnx_export.main, tmp_path) == 2
    assert "pip install 'metro-ext[onnx]'" in capsys.readouterr().err
