"""Relaxed synchronisation beside DDP: loss on held-out text, and bytes sent.

    python bench/relaxed.py [--folder FOLDER] [--output relaxed.json]

Trains one small model for 500 steps on 4 gloo processes of one thread each, on ``books-10m.txt.xz``
(in ``METRO_DATA``, default ``../shared/data``) with a tokenizer of 1024 entries: with gradients
summed at every step (``--parallel ddp``) and with ``--sync relaxed`` (see `metro_ext.relaxed`),
each at three learning rates. The figures of a case are the last evaluation on
``books-valid.txt.xz``, the weighted loss (MLM + 50 RTD + CLM), what a rank has sent by the run's
own count and the whole curve; a relaxed case also has its losses over those of each run of DDP, and
DDP's bytes over its.
``ours`` is a run's seconds in steps, on a shared machine. A run that is there already is not
repeated. The plot goes beside the JSON.
"""

import argparse
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/relaxed.py`

from matplotlib.figure import Figure

from bench import books
from bench.harness import RESULTS, Case, emit
from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.monitor import EVALUATION_FILE, TIMING_FILE, read_records

RANKS, STEPS = 4, 500
SETTINGS = [
    f"--run.accumulation={RANKS}", f"--steps={STEPS}", "--model.layers=2", "--model.hidden=64",
    "--model.ffn=256", "--model.heads=2", "--model.aux_layers=2", "--model.sequence_length=64",
    "--run.tokens_per_batch=4096", "--optim.warmup_steps=50", "--precision=fp32",
    "--run.log_interval=25", "--run.eval_interval=120", "--run.checkpoint_interval=0",
    "--run.eval_batches=25",
]  # fmt: skip
RELAXED = [
    "--sync=relaxed", "--sync.interval=3", "--sync.wire=int4", "--sync.warmup_steps=2",
    "--sync.lr=1.0", "--sync.momentum=0", "--sync.final_momentum=0",
]  # fmt: skip
RUNS = {
    f"{name}-{rate}": [f"--optim.lr={rate}", *own]
    for name, own in (("ddp", []), ("relaxed", RELAXED))
    for rate in ("4e-3", "6e-3", "8e-3")
}
WEIGHTS = {"mlm_loss": 1.0, "rtd_loss": 50.0, "clm_loss": 1.0}  # the defaults of [objective]
SHOWN = ("weighted_loss", *WEIGHTS)


def train(folder: Path, words: list[str]) -> None:
    """Trains on all ranks, unless the run is there, whole."""
    evaluations = read_records(folder / EVALUATION_FILE)
    if evaluations and evaluations[-1]["step"] == STEPS:
        return
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m"]
    subprocess.run(
        [sys.executable, "-m", *launcher, "metro_ext.train", f"--run.dir={folder}", *words],
        cwd=books.ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def curve(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, with the weighted loss."""
    found = read_records(folder / EVALUATION_FILE)
    for record in found:
        record["weighted_loss"] = sum(record[key] * w for key, w in WEIGHTS.items())
    return found


def plot(curves: dict[str, list[dict[str, Any]]]) -> bytes:
    """Held-out losses by step: a PNG."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, key in zip(figure.subplots(2, 2).flat, SHOWN, strict=True):
        for name, records in curves.items():
            label = f"{name}, {records[-1]['sent_bytes'] / 1e6:.0f} MB sent by a rank"
            axes.plot([r["step"] for r in records], [r[key] for r in records], ".-", label=label)
        axes.set(title=key.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def cases(folder: Path) -> tuple[list[Case], dict[str, list[dict[str, Any]]]]:
    """All runs, and their curves."""
    data = books.prepare(folder, vocab_size=1024)
    found, curves = [], {}
    for name, own in RUNS.items():
        words = [*SETTINGS, *own, *data]
        train(folder / name, words)
        seconds = sum(r["seconds"] for r in read_records(folder / name / TIMING_FILE))
        curves[name] = curve(folder / name)
        last = dict(curves[name][-1])
        figures = {key: last[key] for key in ("step", *SHOWN, "unigram_loss", "sent_bytes")}
        figures["sent_bytes_per_step"] = last["sent_bytes"] / STEPS
        peers = {peer: records[-1] for peer, records in curves.items() if peer.startswith("ddp")}
        if not name.startswith("ddp"):
            for peer, other in peers.items():
                figures |= {f"{key}_over_{peer}": last[key] / other[key] for key in SHOWN}
                figures["ddp_bytes_over_these"] = other["sent_bytes"] / last["sent_bytes"]
            least = min(other["weighted_loss"] for other in peers.values())
            figures["weighted_loss_over_best_ddp"] = last["weighted_loss"] / least
        figures["curve"] = [{key: r[key] for key in ("step", *SHOWN)} for r in curves[name]]
        command = ["torchrun", "--standalone", f"--nproc-per-node={RANKS}", "-m", "metro_ext.train"]
        figures["command"] = shlex.join([*command, f"--run.dir={name}", *SETTINGS, *own])
        found.append(
            Case(f"books-10m {name} 2x64 aux 2x64, {RANKS} ranks", seconds, figures=figures)
        )
    return found, curves


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python bench/relaxed.py", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/relaxed"), help="data and runs")
    parser.add_argument("--output", metavar="FILE", help="write the JSON too, to bench/results")
    options = parser.parse_args(argv)
    folder = (books.ROOT / options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    measured, curves = cases(folder)
    if options.output:
        with atomic_write((RESULTS / options.output).with_suffix(".png"), "wb") as file:
            file.write(plot(curves))
    emit("relaxed", measured, threads=1, output=options.output)


if __name__ == "__main__":
    run(main)
