"""The arithmetic and the bookkeeping of the objective study; the study itself takes hours."""

import argparse
import json
import subprocess

import pytest
import torch
from corpora import exit_code, small_tokenizer

from bench import objectives
from bench.objectives import SETTINGS, Part, equal_steps, figures, flops_of, pretrain, summarise
from metro_ext.model import PretrainingModel
from metro_ext.pretrained import load


def test_equal_compute():
    assert equal_steps("metro", 2000, SETTINGS) == 2000
    for objective in ("mlm", "electra", "clm-all"):
        steps = equal_steps(objective, 2000, SETTINGS)
        spent = steps * flops_of(objective, SETTINGS)
        assert spent == pytest.approx(2000 * flops_of("metro", SETTINGS), rel=1e-3)
    assert equal_steps("mlm", 2000, SETTINGS) > equal_steps("electra", 2000, SETTINGS) > 2000
    assert equal_steps("clm-all", 2000, SETTINGS) < 2000


def test_a_finished_part_is_not_trained_again(tmp_path, monkeypatch):
    calls = []

    def train(*words):
        calls.append(words)
        (tmp_path / "mlm-seed1" / "evaluation.jsonl").write_text('{"mlm_perplexity": 9.0}\n')

    monkeypatch.setattr(objectives, "call", train)
    pretrain(Part(tmp_path, "mlm", 1), 5, [], [])
    pretrain(Part(tmp_path, "mlm", 1), 5, [], [])
    assert len(calls) == 1 and "--steps=5" in calls[0]
    for steps, settings in ((6, []), (5, ["--optim.lr=1"])):
        with pytest.raises(ValueError, match="expected a part begun with"):
            pretrain(Part(tmp_path, "mlm", 1), steps, [], settings)
    assert figures(Part(tmp_path, "mlm", 1))["mlm_perplexity"] == 9.0


def test_an_interrupted_part_counts_its_time_and_goes_on(tmp_path, monkeypatch):
    def stop(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(objectives, "call", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(Part(tmp_path, "mlm", 1), 5, [], [])
    found = Part(tmp_path, "mlm", 1).found
    assert found["seconds"] >= 0 and "steps" not in found


def test_the_untrained_model_is_that_of_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "VOCABULARY", 1000)
    small_tokenizer().save(tmp_path / "t.model")
    part = Part(tmp_path, objectives.UNTRAINED, 3)
    settings = ["--model.layers=1", "--model.hidden=16", "--model.heads=2"]
    pretrain(part, 0, [f"--data.tokenizer={tmp_path / 't.model'}"], settings)
    found = load(part.run)
    assert found.step == 0 and found.config.run.seed == 3
    expected = PretrainingModel(found.config.model, "metro", 3)
    for ours, theirs in zip(found.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert figures(Part(tmp_path, objectives.UNTRAINED, 3)) == {"minutes": 0.0}


def test_evaluation_is_kept_for_the_same_options_only(tmp_path, monkeypatch):
    calls = []

    def finetune(*words):
        calls.append(words)
        out = words[words.index("--output") + 1]
        out.mkdir(exist_ok=True)
        (out / "results.json").write_text('{"summary": {"dev.tsv mcc": {"median": 0.5}}}')

    monkeypatch.setattr(objectives, "call", finetune)
    options = argparse.Namespace(blimp_limit=9, tasks=["cola"], finetune_seeds=1, epochs=3,
                                 precision="fp32", train_limit=0, data=tmp_path)  # fmt: skip
    part = Part(tmp_path, "metro", 1)
    part.run.mkdir()
    part.keep(blimp={}, blimp_asked={"limit": 9}, held_out={}, steps=1, seconds=6.0)
    for epochs, expected in ((3, 1), (3, 1), (4, 2)):
        options.epochs = epochs
        objectives.evaluate(Part(tmp_path, "metro", 1), options)
        assert len(calls) == expected
    assert figures(Part(tmp_path, "metro", 1))["cola mcc"] == 50


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    seen = []

    def fail(part, *_):
        seen.append(part.objective)
        if part.objective == "mlm":
            raise subprocess.CalledProcessError(1, ["train"])

    monkeypatch.setattr(objectives, "prepare", lambda _: [])
    monkeypatch.setattr(objectives, "pretrain", fail)
    options = ["--objectives", "mlm", "metro", "--seeds", "1", "--pretrain-only"]
    assert exit_code(objectives.main, *options, "--folder", tmp_path) == 2
    assert seen == ["mlm", "metro"] and "mlm-seed1" in capsys.readouterr().err


def test_report(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "RESULTS", tmp_path)
    parts = []
    for seed, value in ((1, 0.5), (2, 0.75)):
        part = Part(tmp_path, "metro", seed)
        part.run.mkdir()
        part.keep(steps=3, seconds=60.0, held_out={"rtd_auc": value}, blimp={"pll": value},
                  cola={"dev.tsv mcc": {"median": value}})  # fmt: skip
        parts.append(Part(tmp_path, "metro", seed))
    row = summarise(parts)["metro"]
    assert row["BLiMP pll"] == {"median": 62.5, "min": 50.0, "max": 75.0, "seeds": 2}
    assert row["cola mcc"]["median"] == 62.5 and row["minutes"]["median"] == 1.0
    objectives.report(parts, "study", SETTINGS)
    assert json.loads((tmp_path / "study.json").read_text())["table"]["metro"] == row
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"
