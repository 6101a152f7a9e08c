"""The parsers' targets again, guided by coverage: atheris (libFuzzer) chooses the inputs.

    pip install atheris
    python python_tests/faults/fuzz_atheris.py SECONDS FOLDER [TARGET ...] [--faults-json FILE]

Each target of `fuzz_targets` but the operators, whose C++ no Python coverage sees, gets SECONDS in
a process of its own: those of fuzz.py, with the file's content from atheris in place of
`fuzz.mutated`. An input is that content and two bytes that seed the target's own choices (which
kind of file, signed or not). FOLDER keeps the inputs that found new code, so that a later call goes
on from there, and an input that ends a process. Exit code 1: one did.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

LEFT_OUT = ("operators",)
CHOICE_BYTES = 2
FIRST_INPUTS = 40  # with as many sequences of choices: each kind of file is among them
SECONDS_AN_INPUT = 10
ALLOWANCE = 1 << 30  # address space beyond the start: libFuzzer keeps its inputs in memory
INSTRUMENTED = ["metro_ext", "tomllib", "json", "gzip", "lzma"]


def child(name: str, seconds: int, folder: Path) -> None:
    """Fuzzes one target; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import fuzz
        import fuzz_targets

        from metro_ext.errors import UserError

    scratch, inputs = folder / f"{name}-files", folder / name
    scratch.mkdir(exist_ok=True)
    inputs.mkdir(exist_ok=True)
    target = fuzz_targets.TARGETS[name](scratch)
    content = b""

    def recorded(seed: bytes, _chance: random.Random) -> bytes:
        nonlocal content
        content = seed
        return seed

    fuzz.mutated = recorded
    for number in range(FIRST_INPUTS):
        choices = number.to_bytes(CHOICE_BYTES, "little")
        target(random.Random(choices))
        (inputs / f"first-{number:02d}").write_bytes(content + choices)

    fuzz.mutated = lambda _seed, _chance: content

    def one_input(data: bytes) -> None:
        nonlocal content
        content = data[:-CHOICE_BYTES]
        try:
            target(random.Random(data[-CHOICE_BYTES:]))
        except UserError as error:
            if not str(error):
                raise AssertionError("an error without a sentence") from error

    fuzz.ALLOWANCE = ALLOWANCE
    fuzz.limit_memory()
    options = [f"-max_total_time={seconds}", f"-timeout={SECONDS_AN_INPUT}", "-max_len=20000",
               f"-artifact_prefix={folder}/found-{name}-", "-print_final_stats=1"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(inputs)], one_input)
    atheris.Fuzz()


def fuzz_one(name: str, seconds: int, folder: Path) -> dict:
    """The row of a target for the table of faults."""
    command = [sys.executable, __file__, str(seconds), str(folder), name, "--child"]
    begun = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    tried = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    covered = re.findall(r" cov: (\d+) ft: (\d+)", done.stderr)
    if done.returncode or tried is None:
        print(done.stdout[-3000:], done.stderr[-6000:], file=sys.stderr)
    return {
        "test": f"fuzz_atheris.py::{name}",
        "what": "Inputs chosen by coverage (atheris): a result or one sentence, no crash, no hang",
        "outcome": "survived" if done.returncode == 0 and tried else "failed",
        "seconds": round(time.monotonic() - begun, 1),
        "inputs": int(tried[1]) if tried else 0,
        "branches reached at first": int(covered[0][0]) if covered else 0,
        "branches reached": int(covered[-1][0]) if covered else 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("seconds", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--faults-json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.child:
        child(options.targets[0], options.seconds, options.folder)
    from faults_table import update
    from fuzz_targets import TARGETS

    rows = []
    for name in options.targets or [name for name in TARGETS if name not in LEFT_OUT]:
        rows.append(fuzz_one(name, options.seconds, options.folder))
        print(json.dumps(rows[-1]), flush=True)
        if options.faults_json:
            update(options.faults_json, rows)
    return int(any(row["outcome"] != "survived" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
