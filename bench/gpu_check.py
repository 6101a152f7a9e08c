"""Everything that only a machine with a GPU can show, in a few commands and one JSON.

    python bench/gpu_check.py [--seconds 540] [--resume [FILE]] [--stages NAME ...]
        [--output FILE.json]

Builds the extension in place with nvcc against the torch that is installed, then asks of the
kernels: equal draws on CPU and GPU, the same bits when repeated, the values at the sizes of
training, every CUDA test; times attention, the vocabulary head, LayerNorm and the whole step beside
their peers; looks for invalid memory access, races, wrong barriers and uninitialised memory under
compute-sanitizer; and times the other operators. Each stage is a process of its own with a
time limit; one that fails is recorded and the next goes on. A benchmark or a set of checks, under a
sanitizer too, that is cut off leaves what it had; the tests leave the end of their output alone.

All of it takes longer than the ``--seconds`` of one command: a stage that has less than half of its
limit left is not begun, and ``--resume`` goes on where the record ends. One that ``--stages`` names
may take all of ``--seconds``. bench/gpu_check.md has the command lines. The JSON, rewritten after
each stage, goes to bench/results/gpu_check-<GPU>.json; it says which targets (`bench.gpu_targets`)
are met, and ``bench/report.py`` makes the tables of it.

Exit code: 0 if every stage of the record passed, 1 if one did not, 2 without a GPU.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/gpu_check.py`

from bench.gpu_stages import SANITIZER_FOUND, Command, Details, Stage, choose, stages
from bench.gpu_targets import target_lines, targets
from bench.harness import REPOSITORY, RESULTS, commit, machine, sources
from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.errors import UserError

PASSED, FAILED, TIMED_OUT, LEFT_OUT = "passed", "failed", "timed out", "left out"
BUILD = "build"  # of the tree and not of the record: it runs again on every machine
TAIL = 3000  # characters of a failed stage's output that go into the JSON
TOOLKIT = "/usr/local/cuda/bin"  # where nvcc and compute-sanitizer are, if not on the PATH
# What two calls must have in common to be of one record.
SAME = ("device", "torch", "cuda", "full", "sources")


def run_stage(stage: Stage, seconds: float, folder: Path) -> Details:
    """Runs a stage for at most so many seconds; its result as the JSON has it.

    What a stage has printed counts, also of one that was cut off.
    """
    start, status, output, reason = time.monotonic(), PASSED, "", ""
    for command in stage.commands:
        left = seconds - (time.monotonic() - start)
        status, text, reason = _run_command(command, left, folder, stage.environment)
        output += text
        if status != PASSED:
            break
    details: Details = {}
    try:
        details = stage.read(output)
    except (ValueError, OSError, ElementTree.ParseError) as error:
        if status == PASSED:
            status, reason = FAILED, str(error)
    missing = [why for key, why in stage.required.items() if key not in details]
    if status == PASSED and missing:
        status, reason = FAILED, missing[0]
    result = {
        "name": stage.name,
        "status": status,
        "date": now(),
        "seconds": round(time.monotonic() - start, 1),
        "commands": [" ".join(_plain(word, folder) for word in c) for c in stage.commands],
        **details,
    }
    if status != PASSED:
        result |= {"reason": reason, "output_tail": _plain(output[-TAIL:], folder)}
    return result


def _plain(word: str, folder: Path) -> str:
    """Without the paths of this machine: they are of no use to who reads the results."""
    names = {sys.executable: "python", sys.prefix: "PREFIX", str(REPOSITORY): ".",
             str(folder): "FOLDER"}  # fmt: skip
    for path, name in names.items():
        word = word.replace(path, name)
    return word


def _run_command(
    command: Command, seconds: float, folder: Path, environment: dict[str, str]
) -> tuple[str, str, str]:
    """Status, output and reason. The command's children end with it."""
    # The module that was built in place, and not one that is installed.
    packages = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    programs = [os.environ.get("PATH", os.defpath), TOOLKIT]
    variables = {
        "PYTHONPATH": os.pathsep.join(packages),
        "PATH": os.pathsep.join(programs),
        **environment,
    }
    if shutil.which(command[0], path=variables["PATH"]) is None:
        return FAILED, "", f"{command[0]} is not installed or not on the PATH"
    log = folder / "output.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, env=os.environ | variables, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    text = log.read_text(errors="replace")
    if code is None:
        return TIMED_OUT, text, f"took longer than {seconds:.0f} s"
    if code == SANITIZER_FOUND:
        return FAILED, text, "the sanitizer found errors"
    return (FAILED, text, f"ended with code {code}") if code else (PASSED, text, "")


def _end_group(process: subprocess.Popen) -> None:
    """Kills what is left of the command's group: workers outlive a parent that is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stages(
    chosen: Sequence[Stage],
    seconds: float,
    folder: Path,
    save: Callable[[list[Details]], None],
    *,
    named: bool = False,
) -> list[Details]:
    """Every stage in turn, within so many seconds in all; ``save`` sees the results after each.

    Args:
        named: they were asked for by name: each may take all that is left, and not its limit alone.
    """
    end = time.monotonic() + seconds
    results: list[Details] = []
    for stage in chosen:
        left = end - time.monotonic()
        if left < stage.seconds / 2:
            reason = (
                f"{max(left, 0):.0f} of the {seconds:.0f} s of --seconds were left, less than half "
                f"of its {stage.seconds:.0f}"
            )
            results.append({"name": stage.name, "status": LEFT_OUT, "reason": reason})
        else:
            limit = left if named else min(stage.seconds, left)
            results.append(run_stage(stage, limit, folder))
        print(_line(results[-1]), flush=True)
        save(results)
    return results


def read_record(path: Path) -> Details:
    """The record of an earlier call.

    Raises:
        UserError: there is none in that file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--resume: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--resume: {path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("script") != "gpu_check":
        raise UserError(f"--resume: {path} is not a record of bench/gpu_check.py")
    return record


def check_same(before: Details, this: Details) -> None:
    """Two calls are one record only of the same sources, machine and libraries.

    Raises:
        UserError: they differ in one of `SAME`.
    """
    for key in SAME:
        if before.get(key) != this[key]:
            raise UserError(
                f"--resume: the record is of {key} {before.get(key)!r}, this call of "
                f"{this[key]!r}; leave --resume out to begin a new one"
            )


def remaining(
    every: Sequence[Stage], names: Sequence[str], before: Sequence[Details]
) -> list[Stage]:
    """Those to run: the ones that are named, or else all that have not passed and the build."""
    chosen = choose(every, names)
    passed = {result["name"] for result in before if result["status"] == PASSED}
    return [s for s in chosen if names or s.name == BUILD or s.name not in passed]


def merged(
    every: Sequence[Stage], before: Sequence[Details], now: Sequence[Details]
) -> list[Details]:
    """One result a stage, in the order of the whole: the later one, unless it says less."""
    results = {result["name"]: result for result in before}
    for result in now:
        earlier = results.get(result["name"])
        if earlier is None or not _says_less(result, earlier):
            results[result["name"]] = result
    return [results[stage.name] for stage in every if stage.name in results]


def _says_less(later: Details, earlier: Details) -> bool:
    """Than the earlier one: it was left out, or cut off sooner. A failure says something."""
    if later["status"] == LEFT_OUT:
        return earlier["status"] != LEFT_OUT
    if later["status"] == TIMED_OUT:
        return earlier["status"] in (PASSED, FAILED) or _extent(later) < _extent(earlier)
    return False


def _extent(result: Details) -> int:
    return len(result.get("record", {}).get("cases", [])) + result.get("held", 0)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _line(result: Details) -> str:
    figures = [f"{key} {result[key]}" for key in ("held", "passed", "skipped", "summary")
               if key in result]  # fmt: skip
    note = ", ".join(figures) if result["status"] == PASSED else result["reason"]
    return f"{result['name']:<16} {result['status']:<10} {result.get('seconds', 0):>6.1f} s  {note}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/gpu_check.py",
        description="Build, test and time the CUDA kernels on this machine's GPU.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--stages", nargs="+", default=[], metavar="NAME",
        help="build, equality, repeats, values, tests, step, ops (or ops:FAMILY), sanitizers (or "
        "memcheck, racecheck, synccheck, initcheck, or memcheck:FAMILY); default: all. Each may "
        "then take all of --seconds",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="of all stages together (540; full: 7200)")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FILE",
        help="go on with the record in FILE (default: that of --output): without --stages, with "
        "what has not passed there",
    )  # fmt: skip
    parser.add_argument("--full", action="store_true", help="all dtypes and compiled peers")
    parser.add_argument("--commit", help="of a tree without git, for the record")
    parser.add_argument("--output", metavar="FILE", help="default: by the name of the GPU")
    options = parser.parse_args(argv)
    if options.seconds is None:
        options.seconds = 7200.0 if options.full else 540.0
    if options.seconds <= 0:
        raise UserError(f"--seconds must be positive, found {options.seconds:g}")
    return options


def place_of(name: str | None, device: str) -> Path:
    """The file of the record; a bare name lies in bench/results."""
    label = "-".join(re.findall(r"[a-z0-9]+", device.lower()))
    path = Path(name or f"gpu_check-{label}.json")
    path = RESULTS / path if path.parent == Path() else path
    if not path.parent.is_dir():
        raise UserError(f"--output: there is no folder {path.parent}; make it or name another file")
    return path


def last_line(record: Details) -> str:
    """The record in the language of the benchmarks (`bench.harness`): the cases of all stages."""
    cases = [case for r in record["stages"] for case in r.get("record", {}).get("cases", [])]
    outcome = {result["name"]: result["status"] for result in record["stages"]}
    return json.dumps(record | {"machine": machine(), "stages": outcome, "cases": cases})


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if not torch.cuda.is_available():
        raise UserError(
            f"there is no GPU that torch {torch.__version__} can use: run this on a machine with "
            "one and a CUDA build of torch"
        )
    device = torch.cuda.get_device_name()
    path = place_of(options.output, device)
    record = {
        "script": "gpu_check",
        "date": now(),
        "commit": options.commit or commit(),
        "sources": sources(),
        "device": device,
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "full": options.full,
    }
    before: list[Details] = []
    if options.resume is not None:
        earlier = read_record(Path(options.resume) if options.resume else path)
        check_same(earlier, record)
        before = earlier["stages"]

    with tempfile.TemporaryDirectory() as folder:
        every = stages(torch.cuda.get_device_capability(), Path(folder), options.full)

        def save(results: list[Details]) -> None:
            record["stages"] = merged(every, before, results)
            record["targets"] = targets(record["stages"])
            with atomic_write(path, "w") as file:
                file.write(json.dumps(record, indent=1) + "\n")

        chosen = remaining(every, options.stages, before)
        run_stages(chosen, options.seconds, Path(folder), save, named=bool(options.stages))
    print("\n".join(target_lines(record["targets"])))
    print(f"written to {path}")
    print(last_line(record), flush=True)
    return int(any(result["status"] != PASSED for result in record["stages"]))


if __name__ == "__main__":
    run(main)
