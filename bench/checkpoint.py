"""What checkpoints cost a run: steps with one every 50, beside steps without any.

    python bench/checkpoint.py [--rounds N] [--output NAME]

One run of `metro_ext.trainer`, whose rounds of 50 steps differ in how they begin: "ours" with a
checkpoint that is written while training goes on (``run.async_save``), "waiting" with one that
training waits for, "none" without. Times are seconds a step, the checkpoint included;
`checkpoint_mb` is what a checkpoint holds.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/checkpoint.py`

from bench.harness import Case, emit
from bench.timing import medians
from metro_ext.command_line import run
from metro_ext.config import load_config
from metro_ext.distributed import World
from metro_ext.hardware import keep_freed_memory
from metro_ext.monitor import Silent
from metro_ext.prepare import prepare
from metro_ext.trainer import CHECKPOINTS, Trainer

STEPS = 50  # of a round
CONTENDERS = ("ours", "waiting", "none")
SETTINGS = [
    "--model.layers=4", "--model.aux_layers=2", "--model.hidden=512", "--model.ffn=2048",
    "--model.heads=8", "--run.tokens_per_batch=512", "--precision=bf16",
    f"--run.log_interval={STEPS}", "--run.eval_interval=0", "--run.checkpoint_interval=0",
]  # fmt: skip


class Rounds(Silent):
    """A monitor that begins a round every STEPS steps and times those after the first turn."""

    def __init__(self, trainer: Trainer):
        self.times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        self._trainer = trainer
        self._order: Iterator[str] = itertools.cycle(CONTENDERS)
        self._name, self._start = "", 0.0

    def tick(self, step: int) -> None:
        if step % STEPS:
            return
        if step > STEPS * (1 + len(CONTENDERS)):
            self.times[self._name].append((time.perf_counter() - self._start) / STEPS)
        self._trainer.saver.wait()  # nothing of one round is left to the next
        self._name, self._start = next(self._order), time.perf_counter()
        if self._name != "none":
            self._trainer.save()
        if self._name == "waiting":
            self._trainer.saver.wait()


def measure(rounds: int) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        steps = STEPS * (1 + len(CONTENDERS) * (rounds + 1))
        config = load_config([*SETTINGS, f"--run={folder}", f"--steps={steps}"])
        trainer = Trainer(prepare(config, lambda _: None), World())
        keep_freed_memory()
        monitor = Rounds(trainer)
        with trainer.saver:
            trainer.train(monitor)
        files = next(Path(folder, CHECKPOINTS).glob("step-*")).iterdir()
        size = sum(path.stat().st_size for path in files)
    spread = {name: (min(values), max(values)) for name, values in monitor.times.items()}
    median = medians(monitor.times)
    figures = {f"{name}_over_none": median[name] / median["none"] for name in ("ours", "waiting")}
    return Case(
        name=f"step 4x512 aux 2x512 tokens 4x128 bf16 cpu, a checkpoint every {STEPS} steps",
        ours=median.pop("ours"),
        peers=median,
        lesser={"none": "checkpoints"},
        spread=spread,
        figures={"checkpoint_mb": size / 1e6, **figures},
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python bench/checkpoint.py", description="What checkpoints cost a run."
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each (5)")
    parser.add_argument("--output", metavar="NAME", help="write the JSON too, to bench/results")
    options = parser.parse_args(argv)
    emit("checkpoint", [measure(options.rounds)], output=options.output)


if __name__ == "__main__":
    run(main)
