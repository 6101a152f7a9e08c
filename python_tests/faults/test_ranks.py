"""Two ranks of which one meets a fault: both come to the same decision, and nothing is lost."""

import re
import signal
import subprocess
import sys
import time
from os import kill
from pathlib import Path

import pytest
from conftest import SHORT
from fork_server import LONGEST_SECONDS
from test_distributed import free_port
from test_train import assert_same_bits
from training_runs import ENVIRONMENT

from metro_ext.monitor import read_records

RANKS = 2
SHARED = [*SHORT, "--run.accumulation=2", "--parallel.timeout=120"]
MODES = ["ddp", "zero1", "fsdp2"]


class Ranks:
    """A run on two ranks of the server's, with a fault on one of them."""

    def __init__(self, server, folder: Path, argv: list[str], fault_on: int = 0, **fault):
        self._server = server
        self.logs = [folder.with_name(f"{folder.name}-{rank}.log") for rank in range(RANKS)]
        group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = str(free_port())
        words = ["--run", str(folder), *SHARED, *argv]
        self.pids = [
            server.start(
                words, log, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **(fault if rank == fault_on else {}),
            )
            for rank, log in enumerate(self.logs)
        ]  # fmt: skip

    def end(self, *codes: int) -> str:
        """The output of rank 0, once both have ended with these exit codes."""
        found = tuple(self._server.wait(pid) for pid in self.pids)
        outputs = [log.read_text() for log in self.logs]
        assert found == codes, (found, outputs)
        assert not any("Traceback" in out for out in outputs), outputs
        return outputs[0]


@pytest.fixture(scope="module")
def whole(server, text, tmp_path_factory) -> Path:
    """The run on two ranks that others are compared with."""
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    Ranks(server, folder, text).end(0, 0)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_not_finite_on_one_rank(server, text, tmp_path, mode):
    """NaN in one rank's gradient, its loss finite: both skip the step, whichever rank it is"""
    folders = [tmp_path / f"on-{rank}" for rank in range(RANKS)]
    for rank, folder in enumerate(folders):
        fault = {"gradient": {"steps": [5, 6, 17], "value": "nan"}}
        argv = [*text, f"--parallel.mode={mode}"]
        out = Ranks(server, folder, argv, fault_on=rank, **fault).end(0, 0)
        skipped = {r["step"]: r["skipped_steps"] for r in read_records(folder / "metrics.jsonl")}
        assert skipped == {3: 0, 6: 2, 9: 0, 12: 0, 15: 0, 18: 1, 21: 0, 24: 0}
        assert "warning: step 6 was skipped: loss " in out
    # A weight that took one rank's NaN, or a step that only one took, would show.
    assert_same_bits(*folders)


def test_too_many_in_a_row_on_one_rank(server, text, tmp_path):
    """4 of them in a row on one of two ranks: both end with code 2, one sentence in all"""
    fault = {"gradient": {"steps": range(11, 24), "value": "inf"}}
    fault["gradient"]["steps"] = list(fault["gradient"]["steps"])
    ranks = Ranks(
        server, tmp_path / "run", [*text, "--run.max_skipped=4"], fault_on=1, **fault
    )  # fmt: skip
    assert "error: step 11 and the 3 after it" in ranks.end(2, 2)
    assert "error" not in ranks.logs[1].read_text()
    assert (tmp_path / "run" / "faults" / "step-00000010").is_dir()


def test_a_skipped_step_of_relaxed_ranks(server, text, tmp_path):
    """The same between two outer steps of relaxed ranks: one skips, the outer step is finite"""
    argv = [*text, "--sync=relaxed", "--sync.interval=6", "--sync.warmup_steps=6",
            "--run.eval_interval=6", "--run.checkpoint_interval=6"]  # fmt: skip
    fault = {"gradient": {"steps": [8, 9], "value": "nan"}}
    Ranks(server, tmp_path / "run", argv, fault_on=1, **fault).end(0, 0)
    found = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in found if r["skipped_steps"]] == [9]
    assert all(isinstance(r["loss"], float) for r in found)


@pytest.mark.parametrize("rank", range(RANKS))
def test_sigterm_to_one_rank(server, whole, text, tmp_path, record_property, rank):
    """SIGTERM to one rank of two: both save the same step and exit with 0; the same bits"""
    folder = tmp_path / "run"
    argv = [*text, "--run.checkpoint_interval=0"]
    ranks = Ranks(server, folder, argv)
    while server.poll(ranks.pids[0]) is None and " loss " not in ranks.logs[0].read_text():
        time.sleep(0.002)
    kill(ranks.pids[rank], signal.SIGTERM)
    found = re.search(r"stopped after step (\d+), as asked by SIGTERM", ranks.end(0, 0))
    assert found is not None
    step = int(found[1])
    assert (folder / "checkpoints" / f"step-{step:08d}").is_dir() and step < 24
    record_property("stopped after step", step)
    Ranks(server, folder, argv).end(0, 0)
    assert_same_bits(whole, folder)


def test_sigterm_to_the_launcher(whole, text, tmp_path, record_property):
    """SIGTERM to torchrun, as a scheduler sends it: a checkpoint; the same command: same bits"""
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
        "-m", "metro_ext.train", "--run.dir", str(folder), *SHARED, *text,
        "--run.checkpoint_interval=0",
    ]  # fmt: skip
    launcher = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        metrics = folder / "metrics.jsonl"  # opened a moment before the run listens for signals
        while launcher.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.002)
        launcher.send_signal(signal.SIGTERM)
        out, _ = launcher.communicate(timeout=LONGEST_SECONDS)
    finally:
        launcher.kill()
    found = re.search(r"stopped after step (\d+), as asked by SIGTERM", out)
    assert found is not None, out
    record_property("stopped after step", int(found[1]))
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and f"resuming after step {found[1]}" in done.stdout, done
    assert_same_bits(whole, folder)
