"""Fuzzing in small; METRO_FUZZ_INPUTS=N feeds N inputs in all, METRO_FUZZ_SEED=S other ones."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuzz_targets import TARGETS

HERE = Path(__file__).resolve().parent
INPUTS = int(os.environ.get("METRO_FUZZ_INPUTS", 200 * len(TARGETS)))
SEED = int(os.environ.get("METRO_FUZZ_SEED", 1))


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_inputs(target, tmp_path, record_property):
    """Mutated files and arguments: a result or one sentence, no crash, no hang, bounded memory"""
    count = INPUTS // len(TARGETS)
    begun = time.monotonic()
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))
    done = subprocess.run(
        [sys.executable, HERE / "fuzz.py", target, str(count), str(SEED), tmp_path],
        capture_output=True, text=True, errors="replace",
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-6000:])
    counts = json.loads(done.stdout.splitlines()[-1])
    assert sum(counts.values()) == count
    for name, value in {"inputs": count, **counts}.items():
        record_property(name, value)
    record_property("seconds of the target", round(time.monotonic() - begun, 1))
