"""Which runs are captured, in which order a captured step runs, and, on a GPU, that it is the same.

Without a GPU the order is tested against a stand-in for torch.cuda, whose graph repeats the call
that it captured; that a step is fit for a graph is tested in test_train_step.
"""

import contextlib

import pytest
import torch
from test_train import assert_same_bits
from test_train_step import Run
from training_runs import train

from metro_ext.cuda_graph import WARM_UP_STEPS, GraphedStep, wanted
from metro_ext.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "distributed", "compiled", "expected"),
    [
        (CUDA, False, False, True),
        (CPU, False, False, False),
        (CUDA, True, False, False),
        (CUDA, False, True, False),
    ],
)
def test_which_runs_are_captured(device, distributed, compiled, expected):
    assert wanted("auto", device, distributed, compiled) is expected
    assert wanted("off", device, distributed, compiled) is False
    if expected:
        assert wanted("on", device, distributed, compiled) is True
    else:
        with pytest.raises(UserError, match=r"run\.graph is on, .*--run\.graph=auto"):
            wanted("on", device, distributed, compiled)


def test_on_without_cuda_is_one_clear_error(text, tmp_path):
    done = train(tmp_path / "run", "--run.graph=on", "--run.device=cpu", *text, code=2)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "run.graph is on" in line and "CUDA device" in line


def test_an_unknown_mode_is_refused(text, tmp_path):
    done = train(tmp_path / "run", "--run.graph=maybe", *text, code=2)
    assert "run.graph must be one of auto, on, off" in done.stderr


class FakeCuda:
    """The part of torch.cuda that GraphedStep uses; writes what happens into `events`."""

    def __init__(self, monkeypatch):
        self.events: list[str] = []
        self.executes = True  # whether calls made now would run on the device
        events = self.events

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                events.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(_):
                events.append("replay")
                self.captured()

        @contextlib.contextmanager
        def capture(graph, stream):
            events.append(f"capture on {stream.name}")
            self.executes = False
            yield
            self.executes = True

        @contextlib.contextmanager
        def using(stream):
            events.append(f"on {stream.name}")
            yield

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "stream", using)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))


def test_warm_up_then_capture_then_replay(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    run, eager = Run(), Run()

    def step():
        if cuda.executes:
            run.step()

    cuda.captured = run.step
    graphed = GraphedStep(step, CUDA)
    steps = WARM_UP_STEPS + 3
    for number in range(1, steps + 1):
        run.inputs.fill(number, run.batches(number), torch.zeros(3).double(), 0.01)
        graphed()
        eager.take(number)
    aside = ["side waits for current", "on side", "current waits for side"]
    assert cuda.events == aside * WARM_UP_STEPS + ["capture on side"] + ["replay"] * 3
    # Every step once, the captured one included: neither lost nor taken twice.
    assert all(count == steps for count in run.optimizer.steps.values())
    for a, b in zip(run.parameters(), eager.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_cannot_be_captured(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def step():
        if not cuda.executes or len(cuda.events) > 3 * WARM_UP_STEPS:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphed = GraphedStep(step, CUDA)
    for _ in range(WARM_UP_STEPS):
        graphed()
    with pytest.raises(UserError, match=r"\(operation not permitted .* capturing\); use --run"):
        graphed()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [(), ("--run.accumulation=2",), ("--precision=bf16",)])
def test_a_graphed_run_equals_the_eager_run_bit_for_bit(options, text, tmp_path):
    for mode in ("on", "off"):
        train(
            tmp_path / mode, "--steps", "20", "--run.device=cuda", f"--run.graph={mode}",
            *options, *text,
        )  # fmt: skip
    assert_same_bits(tmp_path / "on", tmp_path / "off")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_loss_that_explodes_stops_the_run_and_names_the_step(mode, text, tmp_path):
    """The same step as on the CPU, though it is found at the end of the interval."""
    found = []
    for device in ("cpu", "cuda"):
        graph = mode if device == "cuda" else "off"
        done = train(
            tmp_path / device, "--steps", "20", "--optim.lr=1e30", f"--run.device={device}",
            f"--run.graph={graph}", *text, code=2,
        )  # fmt: skip
        found.append(done.stderr.strip().splitlines()[-1].split(":")[:2])
    assert found[0] == found[1] and found[0][1].startswith(" step ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_neither_an_eager_step_nor_a_replay_waits():
    run = Run(device=torch.device("cuda"))
    graphed = GraphedStep(run.step, run.device)
    for number in range(1, WARM_UP_STEPS + 3):
        # The first step loads kernels, and a capture begins with a synchronisation.
        is_steady = number not in (1, WARM_UP_STEPS + 1)
        torch.cuda.set_sync_debug_mode("error" if is_steady else "default")
        try:
            run.inputs.fill(number, run.batches(number), torch.zeros(3).double(), 0.01)
            graphed()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.tally.skipped[0] == 0
