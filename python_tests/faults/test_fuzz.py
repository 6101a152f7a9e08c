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


# Apart: what runs C++ code of ours or of others. The rest shares one process and its imports,
# unless it has much to do: then what one target finds does not keep the others from their inputs.
NATIVE = ("operators", "tokenizer", "tokenizer_tables")
ALONE = NATIVE if 1000 * len(TARGETS) > INPUTS else tuple(TARGETS)
TOGETHER = [name for name in TARGETS if name not in ALONE]
GROUPS = {"parsers": TOGETHER} if TOGETHER else {}
GROUPS |= {name: [name] for name in ALONE}


@pytest.mark.parametrize("group", GROUPS)
def test_wrong_inputs(group, tmp_path, record_property):
    """Mutated files and arguments: a result or one sentence, no crash, no hang, bounded memory"""
    count, names = INPUTS // len(TARGETS), ",".join(GROUPS[group])
    begun = time.monotonic()
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))
    done = subprocess.run(
        [sys.executable, HERE / "fuzz.py", names, str(count), str(SEED), tmp_path],
        capture_output=True, text=True, errors="replace",
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-6000:])
    counts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["target"] for one in counts] == GROUPS[group]
    assert all(one["accepted"] + one["refused"] == count for one in counts)
    record_property("inputs", count * len(counts))
    record_property("targets", counts)
    record_property("seconds of the process", round(time.monotonic() - begun, 1))
