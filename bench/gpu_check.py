"""Everything that only a machine with a GPU can show, in one command and one JSON.

    python bench/gpu_check.py [--stages NAME ...] [--seconds 600] [--full] [--output FILE.json]

Builds the extension in place with nvcc against the torch that is installed, then asks of the
kernels: equal draws on CPU and GPU, the same bits when repeated, every CUDA test, no invalid memory
access and no race under compute-sanitizer; and times the whole step and every operator beside their
peers. Each stage is a process of its own with a time limit; one that fails is recorded and the next
goes on. What counts most comes first, as the stages that no longer fit into ``--seconds`` are left
out. The JSON, rewritten after each stage, goes to bench/results/gpu_check-<GPU>.json, from which
``bench/report.py`` makes the tables.

Exit code: 0 if every stage passed, 1 if one did not, 2 without a GPU.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/gpu_check.py`

from bench.harness import REPOSITORY, RESULTS, commit, machine
from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.errors import UserError

PASSED, FAILED, TIMED_OUT, LEFT_OUT = "passed", "failed", "timed out", "left out"
TAIL = 3000  # characters of a failed stage's output that go into the JSON
TOOLKIT = "/usr/local/cuda/bin"  # where nvcc and compute-sanitizer are, if not on the PATH
SANITIZER_FOUND = 86  # an exit code of its own, so that errors found differ from a crash
# base++ with a 64K vocabulary, sequences of 512.
STEP = ["--layers=12", "--aux-layers=4", "--hidden=768", "--heads=12", "--vocab=65536", "--seq=512",
        "--tokens=32768", "--precision=bf16"]  # fmt: skip

# Of bench.cases, which cannot be imported before the extension is built.
FAMILIES = ("attention", "vocab_head", "layer_norm", "gelu", "rtd_head", "corruption", "loss")

Command = list[str]
Details = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Commands that are run one after the other until one fails.

    seconds: for all of them.
    read: turns their output into what the JSON says beside the verdict; it raises ValueError where
        the output shows that nothing was checked.
    environment: variables on top of ours.
    """

    name: str
    commands: list[Command]
    seconds: float
    read: Callable[[str], Details] = field(default=lambda output: {})
    environment: dict[str, str] = field(default_factory=dict)


def last_json(output: str) -> Details:
    """The record on the last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    return {}


def checks(output: str) -> Details:
    """How many checks held and which did not."""
    found = last_json(output).get("checks")
    if not found:
        raise ValueError("no check was made")
    wrong = {name: text for name, text in found.items() if text != "ok"}
    return {"held": len(found) - len(wrong), "wrong": wrong}


def sanitizer(output: str) -> Details:
    """The sanitizer's summary beside the checks; without one it did not run."""
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.MULTILINE)
    if not summary:
        raise ValueError("compute-sanitizer printed no summary")
    return {"summary": summary[-1], **checks(output)}


def benchmark(output: str) -> Details:
    record = last_json(output)
    if not record.get("cases"):
        raise ValueError("no case was measured")
    return {"record": record}


def test_counts(report: Path) -> Details:
    """Tests by outcome, and the names of those that failed, of pytest's JUnit report."""
    outcome = {"passed": 0, "failed": [], "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            outcome["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            outcome["skipped"] += 1
        else:
            outcome["passed"] += 1
    if not outcome["passed"] and not outcome["failed"]:
        raise ValueError("no test ran")
    return outcome


def build_commands(capability: tuple[int, int]) -> list[Command]:
    """For this GPU alone where the shipped build has machine code for it: the same code, sooner."""
    machine_code = {(8, 0): "80-real", (9, 0): "90a-real"}.get(capability)
    targets = [f"-DMETRO_CUDA_ARCHITECTURES={machine_code}"] if machine_code else []
    folder = "build/gpu-check"
    return [
        ["cmake", "-S", ".", "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         "-DMETRO_CUDA=AUTO", "-DMETRO_INPLACE=ON", *targets],
        ["cmake", "--build", folder],
        [sys.executable, "-c", "from metro_ext.ops import _C; import sys; "
         "sys.exit(None if _C.build_info()['cuda_version'] else 'nvcc was not found: no kernels')"],
    ]  # fmt: skip


def _test_stage(folder: Path) -> Stage:
    """Tests of the operators by name, as the training tests do not gain from a second device."""
    names = [*FAMILIES, "linear", "token_table", "cuda_graph"]
    files = [f"python_tests/test_{name}.py" for name in names]
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-k", "cuda or devices_may_not_be_mixed",
               f"--junitxml={report}", *files]  # fmt: skip
    return Stage("tests", [command], 200, lambda _: test_counts(report))


def _sanitizer_stage(tool: str, seconds: float) -> Stage:
    options = ["--tool", tool, f"--error-exitcode={SANITIZER_FOUND}"]
    if tool == "racecheck":  # not torch's and cuBLAS's kernels: minutes, and not ours to mend
        options += ["--kernel-regex", "kns=metro"]
    else:
        options += ["--report-api-errors", "no"]
    # Every tensor an allocation of its own: a byte beyond one is then an error and not a neighbour.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", *options, sys.executable, "-m", "bench.gpu_cases", "once"]
    return Stage(tool, [command], seconds, sanitizer, environment)


def _ops_stage(family: str, full: bool) -> Stage:
    quick = [] if full else ["--dtype=bf16", "--rounds=10", "--no-compile"]
    command = [sys.executable, "bench/ops.py", family, "--device=cuda", *quick]
    return Stage(f"ops:{family}", [command], 1200 if full else 90, benchmark)


def stages(capability: tuple[int, int], folder: Path, full: bool) -> list[Stage]:
    """All stages, what counts most first.

    Args:
        capability: of the GPU.
        folder: for the stages' own files.
        full: all dtypes and compiled peers in the benchmarks, which takes the better part of an
            hour.
    """
    module = [sys.executable, "-m", "bench.gpu_cases"]
    peers = [] if full else ["--contenders", "hf eager masters", "hf compiled masters"]
    step = [sys.executable, "bench/step.py", "--device=cuda", *STEP, *peers]
    attention, *others = [_ops_stage(family, full) for family in FAMILIES]
    return [
        Stage("build", build_commands(capability), 240),
        Stage("equality", [[*module, "equality"]], 60, checks),
        Stage("repeats", [[*module, "repeats"]], 60, checks),
        _test_stage(folder),
        _sanitizer_stage("memcheck", 90),
        attention,
        Stage("step", [step], 900 if full else 180, benchmark),
        _sanitizer_stage("racecheck", 90),
        *others,
    ]


def choose(every: Iterable[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages of these names; "ops" stands for all families. In the order of the whole."""
    every = list(every)
    known = [stage.name for stage in every]
    for name in names:
        if name != "ops" and name not in known:
            raise UserError(f"--stages: there is no {name!r}; choose from ops, {', '.join(known)}")
    return [s for s in every if not names or s.name in names or s.name.split(":")[0] in names]


def run_stage(stage: Stage, seconds: float, folder: Path) -> Details:
    """Runs a stage for at most so many seconds; its result as the JSON has it."""
    start, status, output, reason = time.monotonic(), PASSED, "", ""
    for command in stage.commands:
        left = seconds - (time.monotonic() - start)
        status, text, reason = _run_command(command, left, folder, stage.environment)
        output += text
        if status != PASSED:
            break
    details: Details = {}
    try:
        details = stage.read(output) if status != TIMED_OUT else {}
    except (ValueError, OSError, ElementTree.ParseError) as error:
        if status == PASSED:
            status, reason = FAILED, str(error)
    result = {
        "name": stage.name,
        "status": status,
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
    chosen: Sequence[Stage], seconds: float, folder: Path, save: Callable[[list[Details]], None]
) -> list[Details]:
    """Every stage in turn, within so many seconds in all; ``save`` sees the results after each."""
    end = time.monotonic() + seconds
    results: list[Details] = []
    for stage in chosen:
        left = end - time.monotonic()
        if left < 1:
            reason = f"the {seconds:.0f} s of --seconds were used up"
            results.append({"name": stage.name, "status": LEFT_OUT, "reason": reason})
        else:
            results.append(run_stage(stage, min(stage.seconds, left), folder))
        print(_line(results[-1]), flush=True)
        save(results)
    return results


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
        help="build, equality, repeats, tests, step, ops, ops:FAMILY, memcheck, racecheck (all)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="of all stages together (600; full: 7200)")
    parser.add_argument("--full", action="store_true", help="all dtypes and compiled peers")
    parser.add_argument("--output", metavar="FILE", help="default: by the name of the GPU")
    options = parser.parse_args(argv)
    if options.seconds is None:
        options.seconds = 7200.0 if options.full else 600.0
    if options.seconds <= 0:
        raise UserError(f"--seconds must be positive, found {options.seconds:g}")
    return options


def last_line(record: Details, results: list[Details]) -> str:
    """The record in the language of the benchmarks (`bench.harness`): the cases of all stages."""
    cases = [case for r in results for case in r.get("record", {}).get("cases", [])]
    outcome = {result["name"]: result["status"] for result in results}
    return json.dumps(record | {"machine": machine(), "stages": outcome, "cases": cases})


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if not torch.cuda.is_available():
        raise UserError(
            f"there is no GPU that torch {torch.__version__} can use: run this on a machine with "
            "one and a CUDA build of torch"
        )
    device = torch.cuda.get_device_name()
    label = "-".join(re.findall(r"[a-z0-9]+", device.lower()))
    name = options.output or f"gpu_check-{label}.json"
    path = RESULTS / name if Path(name).parent == Path() else Path(name)
    record = {
        "script": "gpu_check",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "full": options.full,
    }

    def save(results: list[Details]) -> None:
        with atomic_write(path, "w") as file:
            file.write(json.dumps(record | {"stages": results}, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        every = stages(torch.cuda.get_device_capability(), Path(folder), options.full)
        chosen = choose(every, options.stages)
        results = run_stages(chosen, options.seconds, Path(folder), save)
    print(f"written to {path}")
    print(last_line(record, results), flush=True)
    return int(any(result["status"] != PASSED for result in results))


if __name__ == "__main__":
    run(main)
