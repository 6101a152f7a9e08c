"""Pretraining on real books, within half an hour on two cores: does the model learn?

    python bench/books.py [--objective metro|electra|clm-all|mlm] [--output FILE.json]

Makes a tokenizer of 4096 entries and token shards from ``books-10m.txt.xz`` (in ``METRO_DATA``,
default ``../shared/data``), trains 4 × 256 (auxiliary 2 × 256) on sequences of 128 tokens by
``python -m metro_ext.train``, and reports the last evaluation on ``books-valid.txt.xz``: every
window of it, beside the unigram model of the training text on the same masked tokens. ``ours`` is
the run's time in seconds, ``peak_mb`` its resident memory at its peak; ``figures`` hold the
evaluation, the share of the time in which training stood still for a batch (``data_wait``) and the
command. The plot goes beside the JSON.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/books.py`

from bench.harness import RESULTS, Case, emit
from metro_ext.command_line import run
from metro_ext.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("METRO_DATA", ROOT.parent / "shared" / "data"))
SETTINGS = [
    "--model.layers=4", "--model.hidden=256", "--model.ffn=1024", "--model.heads=4",
    "--model.aux_layers=2", "--model.sequence_length=128", "--run.tokens_per_batch=4096",
    "--optim.lr=1e-3", "--optim.warmup_steps=300", "--precision=bf16", "--run.log_interval=100",
    "--run.eval_interval=500", "--run.eval_batches=76",
]  # fmt: skip


def call(*words: str | Path) -> None:
    """Runs ``python -m`` on the words; its output is ours."""
    subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, check=True)


# The peak of a process counts the moment before its exec, when it still is a copy of its parent: so
# the parent is this program, which has next to nothing, and not the script, which has torch.
_MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


def call_with_peak(*words: str | Path) -> float:
    """As `call`; the peak of the process's resident memory in MB of 10^6 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        peak = Path(folder) / "peak"
        command = [sys.executable, "-m", *map(str, words)]
        subprocess.run([sys.executable, "-c", _MEASURE, peak, *command], cwd=ROOT, check=True)
        return int(peak.read_text()) * 1024 / 1e6  # Linux counts in KiB


def prepare(folder: Path, vocab_size: int = 4096) -> list[str]:
    """Tokenizer and corpora in the folder, unless they are there; the options that name them."""
    texts = {"train": DATA / "books-10m.txt.xz", "valid": DATA / "books-valid.txt.xz"}
    for text in texts.values():
        if not text.is_file():
            raise UserError(f"{text}: there is no such file; set METRO_DATA to the folder of data")
    model = folder / "books.model"
    if not model.exists():
        size = ["--vocab-size", vocab_size, "--output", model]
        call("metro_ext.tokenizer", "train", texts["train"], *size)
    for name, text in texts.items():
        if not (folder / name).exists():
            place = ["--tokenizer", model, "--output", folder / name]
            call("metro_ext.corpus", "build", text, *place)
    data = [f"--data.{name}={folder / name}" for name in texts]
    return [*data, f"--data.tokenizer={model}"]


def data_wait(run_folder: Path) -> float:
    """The share of a run's time, without evaluations and checkpoints, spent waiting for batches."""
    intervals = [json.loads(line) for line in (run_folder / "timing.jsonl").open()]
    waited = sum(one["data_wait"] * one["seconds"] for one in intervals)
    return waited / sum(one["seconds"] for one in intervals)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python bench/books.py", description=__doc__)
    parser.add_argument("--objective", default="metro")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("runs/books"), help="corpora and runs")
    parser.add_argument("--output", metavar="FILE", help="write the JSON too, to bench/results")
    options = parser.parse_args(argv)
    folder = (ROOT / options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    run_folder = folder / options.objective
    words = ["metro_ext.train", f"--run={run_folder}", f"--objective={options.objective}",
             f"--steps={options.steps}", *SETTINGS, *prepare(folder)]  # fmt: skip
    start = time.perf_counter()
    peak_mb = call_with_peak(*words)
    seconds = time.perf_counter() - start
    held_out = [json.loads(line) for line in (run_folder / "evaluation.jsonl").open()]
    figures = dict(held_out[-1])
    share = figures["mlm_perplexity"] / figures["unigram_perplexity"]
    figures["perplexity_over_unigram"] = share
    figures["data_wait"] = data_wait(run_folder)
    command = shlex.join(["python", "-m", *words]).replace(str(folder), str(options.folder))
    figures["command"] = command
    name = f"books-10m {options.objective} 4x256 aux 2x256 vocabulary 4096 {options.steps} steps"
    if options.output:
        picture = (RESULTS / options.output).with_suffix(".png")
        shutil.copy(run_folder / "training.png", picture)
    case = Case(name, seconds, peak_mb=peak_mb, figures=figures)
    emit("books", [case], output=options.output)


if __name__ == "__main__":
    run(main)
