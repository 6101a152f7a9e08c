"""Runs of ``python -m metro_ext.train`` small enough for a test."""

import os
import subprocess
import sys

TINY = [
    "--model.layers=1", "--model.hidden=32", "--model.ffn=64", "--model.aux_layers=1",
    "--model.heads=2", "--model.sequence_length=32", "--run.tokens_per_batch=256",
    "--data.vocab_size=400", "--run.log_interval=3", "--run.eval_batches=2",
    "--run.eval_interval=8", "--run.checkpoint_interval=4", "--optim.warmup_steps=5",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder, *options) -> list[str]:
    return [sys.executable, "-m", "metro_ext.train", "--run", str(folder), *TINY, *options]


def train(folder, *options, code=0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(folder, *options), capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done
