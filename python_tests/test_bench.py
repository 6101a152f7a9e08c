"""What all benchmarks share: a wrong harness makes every figure wrong."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed metro_ext is found before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import harness
from bench.harness import Case, emit
from bench.timing import (
    LEAST_ROUNDS,
    CopyCeiling,
    MatrixCeiling,
    Stopwatch,
    Work,
    interleave,
    map_large_blocks,
    medians,
    peak_memory,
    peak_of_call,
    start_peak,
)
from bench.workers import Crew, Worker, WorkerError
from metro_ext.errors import UserError
from metro_ext.hardware import keep_freed_memory

CPU = torch.device("cpu")
CASE_KEYS = {
    "name", "ours", "peers", "ratio", "ratios", "lesser", "floor_seconds", "floor_share",
    "peak_mb", "peers_peak_mb", "peak_ratios", "spread", "figures",
}  # fmt: skip
MACHINE_KEYS = {"cpu", "cores", "isa", "malloc", "memory_gb", "gpu", "torch", "python", "threads"}

TINY_WORKER = """
import os, signal, sys
from bench.workers import serve

calls = 0

def count(by):
    global calls
    calls += by
    print("noise of a library")  # must not reach the parent
    os.write(1, b"noise of a kernel\\n")
    return {"name": sys.argv[2], "calls": calls, "extra": sys.argv[3:]}

def fail():
    raise ValueError("first line\\nsecond line")

if __name__ == "__main__":
    serve({"count": count, "fail": fail, "die": lambda: os.kill(os.getpid(), signal.SIGKILL)})
"""


@pytest.fixture
def tiny_worker(tmp_path, monkeypatch):
    """The name of a module whose workers count their calls."""
    (tmp_path / "tiny_worker.py").write_text(TINY_WORKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tiny_worker"


def example() -> Case:
    return Case(
        name="example",
        ours=2.0,
        peers={"slow": 6.0, "quick": 3.0, "cheat": 1.0, "gone": "absent: not installed"},
        lesser={"cheat": "the work"},
        floor_seconds=0.5,
        peak_mb=100.0,
        peers_peak_mb={"slow": 400.0, "quick": 200.0},
        spread={"ours": (1.9, 2.2)},
        figures={"tokens_per_s": {"ours": 10.0}, "odd": 1 / 3},
    )


def test_ratio_is_to_the_best_peer_that_does_all_the_work():
    case = example()
    assert case.ratio == 1.5
    assert case.ratios == {"slow": 3.0, "quick": 1.5, "cheat": 0.5}
    assert case.floor_share == 0.25
    assert case.peak_ratios == {"slow": 0.25, "quick": 0.5}


def test_ratio_without_a_peer_is_none():
    case = Case("alone", 1.0, peers={"gone": "absent: CUDA only"})
    assert (case.ratio, case.floor_share, case.peak_ratios) == (None, None, {})


def test_last_line_is_the_record(capsys, tmp_path):
    path = tmp_path / "record.json"
    emit("example", [example()], ceilings={"copy GB/s": 12.5}, threads=3, output=path)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert set(record) == {"script", "date", "commit", "device", "machine", "ceilings", "cases"}
    assert set(record["machine"]) == MACHINE_KEYS
    assert record["machine"]["threads"] == 3
    assert record["device"] == "cpu"
    assert record["date"].endswith("+00:00")
    assert record["ceilings"] == {"copy GB/s": 12.5}
    (case,) = record["cases"]
    assert set(case) == CASE_KEYS
    assert case["peers"]["gone"] == "absent: not installed"
    assert case["figures"]["odd"] == 0.333333
    assert json.loads(path.read_text()) == record
    assert any("cheat" in line and "without: the work" in line for line in lines)


def test_bare_output_name_lies_in_results(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    emit("example", [], output="machine.json")
    assert json.loads((tmp_path / "results" / "machine.json").read_text())["cases"] == []


def test_output_into_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        emit("example", [], output=tmp_path / "nowhere" / "record.json")


def test_a_figure_that_is_not_a_number_is_refused(capsys):
    with pytest.raises(ValueError, match="JSON compliant"):
        emit("example", [Case("broken", math.nan)])


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.345, "12.35 s"), (0.0123, "12.30 ms"), (4.2e-6, "4.200 us")]
)
def test_seconds_carry_their_unit(seconds, text):
    assert harness.seconds_text(seconds) == text


class FakeClock:
    """Stands still until it is told to pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_medians_on_a_fake_clock():
    clock = FakeClock()
    watch = Stopwatch(CPU, clock=clock)
    turns, durations = [], {"a": [9, 9, 1, 5, 3], "b": [9, 9, 2, 2, 8]}

    def contender(name):
        def work():
            turns.append(name)
            clock.now += durations[name][turns.count(name) - 1]

        return lambda: watch.time(work)

    times = interleave({name: contender(name) for name in "ab"}, rounds=3, warmup=2)
    assert turns == ["a", "b"] * 5
    assert times == {"a": [1, 5, 3], "b": [2, 2, 8]}
    assert medians(times) == {"a": 3, "b": 2}


def test_no_turn_begins_after_the_time_is_up():
    clock = FakeClock()

    def contender():
        clock.now += 1.0
        return 1.0

    for seconds, rounds in ((3.0, LEAST_ROUNDS), (12.5, 12), (100.0, 20)):
        times = interleave({"a": contender}, 20, 1, seconds=seconds, clock=clock)
        assert times == {"a": [1.0] * rounds}


def test_a_contender_that_fails_leaves_the_turns():
    calls = []

    def steady():
        calls.append("a")
        return 1.0

    def failing():
        calls.append("b")
        if calls.count("b") == 3:
            raise WorkerError("out of memory")
        return 2.0

    dropped = []
    contenders = {"b": failing, "a": steady}
    times = interleave(
        contenders, rounds=4, warmup=1, drop=lambda name, error: dropped.append((name, str(error)))
    )
    assert times == {"a": [1.0] * 4}
    assert dropped == [("b", "out of memory")]
    assert calls == [*"ba" * 3, "a", "a"]
    calls.clear()
    with pytest.raises(WorkerError):
        interleave(contenders, rounds=4, warmup=1)


def test_rest_before_each_call(monkeypatch):
    rests = []
    monkeypatch.setattr("bench.timing.time.sleep", rests.append)
    interleave({"a": lambda: 1.0, "b": lambda: 1.0}, rounds=2, warmup=1, pause=0.5)
    assert rests == [0.5] * 6


def test_floor_is_the_longer_of_memory_and_arithmetic():
    work = Work(bytes=100.0, flops=60.0)
    assert work.floor(bytes_per_s=10.0, flops_per_s=20.0) == 10.0
    assert work.floor(bytes_per_s=100.0, flops_per_s=20.0) == 3.0
    assert Work(bytes=1.0).floor(1.0, math.inf) == 1.0
    assert work + Work(1.0, 2.0) == Work(101.0, 62.0)


def test_ceilings_state_the_work_that_they_time(monkeypatch):
    monkeypatch.setattr("bench.timing.COPY_BYTES", {"cpu": 1 << 16})
    copy, product = CopyCeiling(CPU), MatrixCeiling(8, 4, 16, torch.bfloat16, CPU)
    assert copy() > 0
    assert torch.equal(copy.target, copy.source)
    assert copy.bytes == 2 * copy.source.numel() * 4
    assert product() > 0
    assert product.flops == 2 * 8 * 4 * 16


@pytest.mark.skipif(start_peak(CPU) is None, reason="this system cannot reset a peak")
def test_peak_memory_sees_what_was_freed():
    size = 64 << 20
    held = start_peak(CPU)
    block = torch.ones(size // 4)
    del block
    peak = peak_memory(CPU) - held
    assert size * 0.95 <= peak <= size * 1.5
    held = start_peak(CPU)
    assert peak_memory(CPU) - held < size / 4


@pytest.mark.skipif(start_peak(CPU) is None, reason="this system cannot reset a peak")
def test_peak_of_a_call_does_not_depend_on_what_the_allocator_kept():
    size = 64 << 20
    assert keep_freed_memory()
    try:
        torch.ones(size)  # freed, and kept
        peak = peak_of_call(CPU, lambda: torch.ones(size // 4))
    finally:
        map_large_blocks()
    assert size * 0.95 <= peak <= size * 1.5


def test_workers_keep_their_state_and_answer_in_turns(tiny_worker):
    with Worker(tiny_worker, "one", ["--x", "1"]) as one, Worker(tiny_worker, "two") as two:
        assert one.call("count", by=1) == {"name": "one", "calls": 1, "extra": ["--x", "1"]}
        assert two.call("count", by=5)["calls"] == 5
        assert one.call("count", by=1)["calls"] == 2
    assert one.process.returncode == two.process.returncode == 0


def test_a_worker_outlives_an_error(tiny_worker, capfd):
    with Worker(tiny_worker, "one") as worker:
        with pytest.raises(WorkerError, match=r"^one: ValueError: first line$"):
            worker.call("fail")
        assert worker.call("count", by=1)["calls"] == 1
    assert "second line" in capfd.readouterr().err


def test_a_worker_that_dies_is_named(tiny_worker):
    with Worker(tiny_worker, "one") as worker:
        with pytest.raises(WorkerError, match="one: killed by SIGKILL"):
            worker.call("die")
        with pytest.raises(WorkerError, match="one: killed by SIGKILL"):
            worker.call("count", by=1)


def test_a_crew_goes_on_without_a_worker_that_fails(tiny_worker):
    with Crew(tiny_worker, ["--x", "1"], needed=["ours"]) as crew:
        crew.muster(["ours", "peer", "other"])
        ours, peer, other = crew.workers.values()
        assert crew.attempt("peer", "count", by=1)["extra"] == ["--x", "1"]
        assert crew.attempt("peer", "fail") is None
        assert crew.present == ["ours", "other"] and crew.absent == {
            "peer": "peer: ValueError: first line"
        }
        assert peer.process.returncode is not None and other.process.poll() is None
        with pytest.raises(WorkerError, match="ours: ValueError"):
            crew.attempt("ours", "fail")
        with pytest.raises(KeyError):  # not a worker's failure: a mistake of the benchmark
            crew.drop("other", KeyError("x"))
        crew.muster(["ours", "peer"])
        assert crew.absent == {} and crew.workers["ours"] is ours
        assert crew.attempt("peer", "count", by=1)["calls"] == 1  # in a new process
    assert ours.process.returncode is not None and other.process.returncode is not None
