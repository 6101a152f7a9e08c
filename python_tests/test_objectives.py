"""The arithmetic and the bookkeeping of the objective study; the study itself takes hours."""

import json

import pytest

from bench import objectives
from bench.objectives import SETTINGS, Part, equal_steps, figures, flops_of, pretrain, summarise


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
    assert figures(Part(tmp_path, "mlm", 1))["mlm_perplexity"] == 9.0


def test_an_interrupted_part_counts_its_time_and_goes_on(tmp_path, monkeypatch):
    def stop(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(objectives, "call", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(Part(tmp_path, "mlm", 1), 5, [], [])
    found = Part(tmp_path, "mlm", 1).found
    assert found["seconds"] >= 0 and "steps" not in found


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
