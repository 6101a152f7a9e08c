"""The stages of ``bench/gpu_check.py``: what each runs and how its output is read."""

import importlib.util
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metro_ext.errors import UserError

SANITIZER_FOUND = 86  # an exit code of its own, so that errors found differ from a crash
# base++ with a 64K vocabulary, sequences of 512.
STEP = ["--layers=12", "--aux-layers=4", "--hidden=768", "--heads=12", "--vocab=65536", "--seq=512",
        "--tokens=32768", "--precision=bf16"]  # fmt: skip
# Of bench.cases, which cannot be imported before the extension is built.
FAMILIES = ("attention", "vocab_head", "layer_norm", "gelu", "rtd_head", "corruption", "loss")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OF_TOOL = {tool: [f"{tool}:{family}" for family in FAMILIES] for tool in TOOLS}
# Names of several stages.
GROUPS = {
    "ops": [f"ops:{family}" for family in FAMILIES],
    "sanitizers": [name for names in OF_TOOL.values() for name in names],
    **OF_TOOL,
}
# python_tests/test_*: of the operators, as the training tests do not gain from a second device.
GPU_TESTS = (*FAMILIES, "linear", "token_table", "cuda_graph")
GPU_TEST_WORDS = ("cuda", "devices_may_not_be_mixed")  # in the name of a test that needs a GPU
TEST_WORKERS = 4  # each has a context of its own on the one GPU

Command = list[str]
Details = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Commands that are run one after the other until one fails.

    seconds: for all of them, where it is one of many; one that is asked for by name may take more.
    read: turns their output into what the JSON says beside the verdict; it raises ValueError where
        the output shows that nothing was checked.
    required: keys of what is read that a stage which passed has, and what it means that one is not
        there. A stage that was cut off may lack them.
    environment: variables on top of ours.
    """

    name: str
    commands: list[Command]
    seconds: float
    read: Callable[[str], Details] = field(default=lambda output: {})
    required: Mapping[str, str] = field(default_factory=dict)
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
    """The checks, and the sanitizer's summary where it came to one."""
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.MULTILINE)
    return checks(output) | ({"summary": summary[-1]} if summary else {})


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
    files = [f"python_tests/test_{name}.py" for name in GPU_TESTS]
    report = folder / "tests.xml"
    workers = ["-n", str(TEST_WORKERS)] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *workers, "-k", " or ".join(GPU_TEST_WORDS),
               f"--junitxml={report}", *files]  # fmt: skip
    return Stage("tests", [command], 150, lambda _: test_counts(report))


def _sanitizer_stage(tool: str, family: str) -> Stage:
    options = ["--tool", tool, f"--error-exitcode={SANITIZER_FOUND}"]
    # torch's kernels take minutes, and are not ours to mend; but initcheck has to see every kernel
    # that writes what ours read.
    if tool != "initcheck":
        options += ["--kernel-name", "kns=metro"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]
    # Every tensor an allocation of its own: a byte beyond one is then an error and not a neighbour.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", *options, *_cases("once", "--family", family)]
    required = {"summary": "compute-sanitizer printed no summary"}  # it did not watch
    return Stage(f"{tool}:{family}", [command], 60, sanitizer, required, environment)


def _cases(what: str, *words: str) -> Command:
    return [sys.executable, "-m", "bench.gpu_cases", what, "--running-record", *words]


def _ops_stage(family: str, seconds: float, full: bool) -> Stage:
    quick = [] if full else ["--dtype=bf16", "--rounds=10", "--no-compile"]
    command = [sys.executable, "bench/ops.py", family, "--device=cuda", "--running-record", *quick]
    return Stage(f"ops:{family}", [command], 1200 if full else seconds, benchmark)


def stages(capability: tuple[int, int], folder: Path, full: bool) -> list[Stage]:
    """All stages, what counts most first: what is right, then what the targets ask for.

    Args:
        capability: of the GPU.
        folder: for the stages' own files.
        full: all dtypes and compiled peers in the benchmarks, which takes the better part of an
            hour.
    """
    # Both of the compiled ones: a target is a ratio to the faster.
    peers = [] if full else ["--contenders", "hf compiled autocast", "hf compiled masters"]
    step = [sys.executable, "bench/step.py", "--device=cuda", "--running-record", *STEP, *peers]
    of_targets = {"attention": 150.0, "vocab_head": 120.0, "layer_norm": 60.0}
    return [
        Stage("build", build_commands(capability), 240),
        Stage("equality", [_cases("equality")], 60, checks),
        Stage("repeats", [_cases("repeats")], 60, checks),
        Stage("values", [_cases("values")], 60, checks),
        _test_stage(folder),
        *(_ops_stage(family, seconds, full) for family, seconds in of_targets.items()),
        Stage("step", [step], 900 if full else 300, benchmark),
        *(_sanitizer_stage(tool, family) for tool in TOOLS for family in FAMILIES),
        *(_ops_stage(family, 45, full) for family in FAMILIES if family not in of_targets),
    ]


def choose(every: Iterable[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages of these names, or all; a name of `GROUPS` stands for several. In their order."""
    every = list(every)
    known = [stage.name for stage in every]
    wanted: set[str] = set()
    for name in names:
        if name not in GROUPS and name not in known:
            names = [*GROUPS, *(stage for stage in known if ":" not in stage)]
            raise UserError(
                f"--stages: there is no {name!r}; choose from {', '.join(names)}, or ops and the "
                f"sanitizers of one family, as ops:{FAMILIES[0]}: {', '.join(FAMILIES)}"
            )
        wanted.update(GROUPS.get(name, [name]))
    return [stage for stage in every if not names or stage.name in wanted]
