"""NaN and infinity in the loss of a whole run: skipped, counted, replayed, and the run's end."""

import json

import pytest
from conftest import SHORT
from fork_server import FAULTS
from test_train import assert_same_bits, bits

from metro_ext import replay
from metro_ext.monitor import read_records


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_skipped_step_is_counted_and_the_run_goes_on(server, text, tmp_path, log, value):
    """NaN or infinity in the loss of 3 steps: skipped, counted in metrics.jsonl, warned of"""
    folder = tmp_path / "run"
    out = server.run(
        ["--run", str(folder), *SHORT, *text], log, loss={"steps": [5, 6, 17], "value": value}
    )
    skipped = {r["step"]: r["skipped_steps"] for r in read_records(folder / "metrics.jsonl")}
    assert skipped == {3: 0, 6: 2, 9: 0, 12: 0, 15: 0, 18: 1, 21: 0, 24: 0}
    assert "warning: step 6 was skipped: loss " in out and "(2 skipped since the last line)" in out
    assert not (folder / "faults").exists()


def test_a_resumed_run_keeps_count(server, text, tmp_path, log):
    """Skipped steps on both sides of a SIGTERM and of a checkpoint: the same bits as unbroken"""
    fault = {"loss": {"steps": [7, 8, 9, 10, 15], "value": "nan"}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    server.run(["--run", str(whole), *SHORT, *text], log, **fault)
    for steps in ("8", "24"):  # the interval of the last line, and the row, go through the cut
        argv = ["--run", str(parts), *SHORT, *text, "--run.log_interval=3"]
        hang = {"hang": {"step": int(steps) + 1, "where": "step"}} if steps == "8" else {}
        guard = ["--run.hang_timeout=1"] if hang else []
        server.run([*argv, *guard], log, code=1 if hang else 0, **fault, **hang)
    assert_same_bits(whole, parts)


def test_too_many_in_a_row_end_the_run(server, text, tmp_path, log, capsys, monkeypatch):
    """4 steps in a row: exit code 2; the batch's identity and the weights saved, and replayed"""
    folder = tmp_path / "run"
    argv = ["--run", str(folder), *SHORT, *text, "--run.max_skipped=4"]
    fault = {"loss": {"steps": [2, *range(11, 24)], "value": "nan"}}
    out = server.run(argv, log, code=2, **fault)
    assert "error: step 11 and the 3 after it" in out and "metro_ext.replay" in out
    saved = json.loads((folder / "faults" / "step-00000010" / "state.json").read_text())["state"]
    assert saved["skipped_steps"] == [11, 14] and saved["loss"] == "nan"
    (batch,) = saved["batches"]
    assert batch["index"] == 10 and batch["rank"] == 0 and batch["documents"]
    # The weights are those of step 10: nothing was updated since.
    before = bits(folder)["tensors"]
    again = server.run(argv, log, code=2, **fault)
    assert "step 11 and the 3 after it" in again  # it does not go round in circles
    assert bits(folder)["tensors"].keys() == before.keys()

    step, (part,) = replay.replay(folder)
    assert step == 11 and part.is_finite and part.module is None  # the fault is gone
    FAULTS_OF_A_MODULE = "main.layers.0.ffn_norm"
    load = replay.Trainer.__init__

    def broken(self, *arguments):
        load(self, *arguments)
        module = self.model.get_submodule(FAULTS_OF_A_MODULE)
        spoil = lambda _m, _i, output: output._replace(out=output.out * float("nan"))  # noqa: E731
        module.register_forward_hook(spoil, prepend=True)

    monkeypatch.setattr(replay.Trainer, "__init__", broken)
    assert replay.main([str(folder)]) is None
    shown = capsys.readouterr().out
    assert f"first output that is not finite: {FAULTS_OF_A_MODULE}" in shown
    assert f"documents {batch['documents'][0]}" in shown and "loss nan" in shown
    # A larger limit goes on past the batches.
    fault["loss"]["steps"] = [2, 11, 12, 13, 14, 15]
    server.run([*argv, "--run.max_skipped=6"], log, **fault)


def test_nothing_to_replay(unbroken, capsys):
    """A run without faults: one sentence"""
    with pytest.raises(replay.UserError, match="expected the faults of a run"):
        replay.replay(unbroken)
    assert set(FAULTS) == {"loss", "gradient", "hang", "clock", "file_limit"}
