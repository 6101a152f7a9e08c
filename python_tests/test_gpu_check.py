"""bench/gpu_check.py where there is no GPU: its stages, its record and its refusal."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# Last, so that an installed metro_ext is found before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import gpu_check, gpu_stages
from bench.gpu_check import FAILED, LEFT_OUT, PASSED, TIMED_OUT
from bench.gpu_stages import Stage
from metro_ext.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(stage: Stage, folder: Path, seconds: float = 300.0) -> dict:
    return gpu_check.run_stage(stage, seconds, folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path):
    command = [sys.executable, "bench/gpu_check.py", "--output", str(tmp_path / "x.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no GPU") and done.stderr.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_a_failure_does_not_stop_the_later_stages(tmp_path, capsys):
    saved = []
    every = [
        Stage("breaks", [python("import sys; print(sys.prefix); exit(3)"), python("0")], 300),
        Stage("absent", [["metro-no-such-program"]], 300),
        Stage("works", [python("print(1)"), python("print('{\"cases\": [1]}')")], 300,
              gpu_stages.benchmark),
    ]  # fmt: skip
    results = gpu_check.run_stages(every, 600, tmp_path, lambda r: saved.append(len(r)))
    assert saved == [1, 2, 3]
    breaks, absent, works = results
    assert (breaks["status"], breaks["reason"]) == (FAILED, "ended with code 3")
    assert breaks["output_tail"] == "PREFIX\n"  # no path of this machine
    assert absent["status"] == FAILED and "not installed" in absent["reason"]
    assert works["status"] == PASSED and works["record"] == {"cases": [1]}
    assert "output_tail" not in works
    assert str(sys.executable) not in json.dumps(results)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        FAILED, FAILED, PASSED
    ]  # fmt: skip


def test_a_stage_that_takes_too_long_ends_with_its_children(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    result = run(Stage("slow", [python(parent)], 30), tmp_path, seconds=0.5)
    assert result["status"] == TIMED_OUT
    assert 0.4 < result["seconds"] < 2
    time.sleep(2)
    assert not mark.exists()


def test_what_no_longer_fits_is_left_out(tmp_path):
    """With less than half of its limit left; a shorter one that comes later is still run."""
    every = [Stage("slow", [python("import time; time.sleep(30)")], 1.2),
             Stage("long", [python("0")], 10**6), Stage("late", [python("0")], 300)]  # fmt: skip
    slow, long, late = gpu_check.run_stages(every, 600, tmp_path, lambda r: None)
    assert slow["status"] == TIMED_OUT and late["status"] == PASSED
    assert long["status"] == LEFT_OUT and "of the 600 s of --seconds were left" in long["reason"]


def test_sanitizers_watch_our_kernels_and_one_family_each(tmp_path):
    every = gpu_stages.stages((9, 0), tmp_path, full=False)
    for stage in gpu_stages.choose(every, ["sanitizers"]):
        (command,) = stage.commands
        tool, family = stage.name.split(":")
        assert command[command.index("--tool") + 1] == tool
        assert ("kns=metro" in command) == (tool != "initcheck")
        assert command[command.index("--family") + 1 :] == [family]


def test_what_a_stage_had_is_kept_when_it_is_cut_off(tmp_path):
    """Of a benchmark and of checks; a last line that is only half there does not count."""
    lines = [json.dumps({"script": "ops", "cases": [{"name": n} for n in names]})
             for names in ("a", "ab")]  # fmt: skip
    printed = tmp_path / "printed"

    def cut_off(text: str, read) -> dict:
        printed.write_text(text)
        command = ["sh", "-c", f"cat {printed}; exec sleep 600"]
        result = run(Stage("x", [command], 600, read), tmp_path, seconds=2.0)
        assert result["status"] == TIMED_OUT
        return result

    result = cut_off("\n".join([*lines, lines[1][:20]]), gpu_stages.benchmark)
    assert [case["name"] for case in result["record"]["cases"]] == ["a", "b"]
    result = cut_off('{"checks": {"a": "ok"}}\n', gpu_stages.checks)
    assert (result["held"], result["wrong"]) == (1, {})
    assert "held" not in cut_off("", gpu_stages.checks)


def sanitizer_stage(folder: Path, code: str) -> Stage:
    """As the check has it, but with a program of this code in the sanitizer's place."""
    (stage,) = gpu_stages.choose(gpu_stages.stages((9, 0), folder, False), ["memcheck:loss"])
    return dataclasses.replace(stage, commands=[python(code)])


def test_a_sanitizer_that_is_cut_off_leaves_its_checks(tmp_path):
    printed = tmp_path / "printed"
    printed.write_text('========= COMPUTE-SANITIZER\n{"checks": {"a": "ok", "b": "bad"}}\n')
    stage = sanitizer_stage(tmp_path, "")
    stage = dataclasses.replace(stage, commands=[["sh", "-c", f"cat {printed}; exec sleep 600"]])
    result = run(stage, tmp_path, seconds=2.0)
    assert (result["status"], result["reason"]) == (TIMED_OUT, "took longer than 2 s")
    assert (result["held"], result["wrong"]) == (1, {"b": "bad"}) and "summary" not in result


def test_a_sanitizer_without_a_summary_has_not_passed(tmp_path):
    result = run(sanitizer_stage(tmp_path, 'print(\'{"checks": {"a": "ok"}}\')'), tmp_path)
    assert result["status"] == FAILED and "printed no summary" in result["reason"]
    assert result["held"] == 1


def test_stages_are_chosen_by_name_and_keep_their_order(tmp_path):
    every = gpu_stages.stages((9, 0), tmp_path, full=False)
    assert gpu_stages.choose(every, []) == every
    names = [s.name for s in gpu_stages.choose(every, ["sanitizers", "ops", "build"])]
    assert names[0] == "build" and "step" not in names
    sanitizers = [f"{t}:{f}" for t in gpu_stages.TOOLS for f in gpu_stages.FAMILIES]
    assert [name for name in names if "check:" in name] == sanitizers
    racecheck = [s.name for s in gpu_stages.choose(every, ["racecheck"])]
    assert racecheck == [name for name in sanitizers if name.startswith("racecheck:")]
    assert [s.name for s in gpu_stages.choose(every, ["initcheck:gelu"])] == ["initcheck:gelu"]
    ops = [name for name in names if name.startswith("ops:")]
    assert sorted(ops) == sorted(f"ops:{family}" for family in gpu_stages.FAMILIES)
    (one,) = gpu_stages.choose(every, ["ops:gelu"])
    assert "gelu" in one.commands[0]
    with pytest.raises(UserError, match="there is no 'memchek'; choose from ops, sanitizers, mem"):
        gpu_stages.choose(every, ["memchek"])
    with pytest.raises(UserError, match="--seconds must be positive, found 0"):
        gpu_check.parse(["--seconds", "0"])


@pytest.mark.parametrize("full", [False, True])
def test_the_commands_are_ones_that_the_scripts_know(tmp_path, full, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from bench import ops, step

    parsers = {"bench/ops.py": ops.parse, "bench/step.py": step.parse}
    parsed = 0
    for stage in gpu_stages.stages((8, 0), tmp_path, full):
        _, script, *words = stage.commands[-1]
        if script in parsers:
            options = parsers[script](words)
            assert options.device == "cuda" and options.running_record
            if script == "bench/step.py":
                of_all = step.peer_names(step.parse(["--peer=hf", "--precision=bf16"]))
                compiled = [name for name in of_all if "compiled" in name]
                assert len(compiled) == 2
                assert step.peer_names(options) == (of_all if full else compiled)
            parsed += 1
    assert parsed == 1 + len(gpu_stages.FAMILIES)


def test_the_document_has_the_limits_of_the_stages(tmp_path):
    text = (REPOSITORY / "bench" / "gpu_check.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w:, ]+) \| (\d+)(?: each| a family)? \|", text, re.MULTILINE)
    limits = {}
    for names, seconds in rows:
        first, *others = names.split(", ")
        group = first.split(":")[0] + ":" if ":" in first else ""
        limits |= {name: float(seconds) for name in (first, *(group + n for n in others))}
    every = gpu_stages.stages((9, 0), tmp_path, full=False)
    limits = {s.name: limits[name] for name in limits for s in gpu_stages.choose(every, [name])}
    assert limits == {stage.name: stage.seconds for stage in every}
    (minutes,) = re.findall(r"limits together are (\d+) minutes", text)
    assert sum(limits.values()) == 60 * int(minutes)
    commands = re.findall(r"^python bench/gpu_check.py (.*)$", text, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        options = gpu_check.parse(command.split())
        assert options.seconds == 540
        gpu_stages.choose(every, options.stages)


def test_tests_run_side_by_side_where_pytest_can(tmp_path, monkeypatch):
    def command() -> list[str]:
        (stage,) = gpu_stages.choose(gpu_stages.stages((9, 0), tmp_path, False), ["tests"])
        return stage.commands[0]

    found = {"xdist": object()}
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", found.get)
    assert command()[command().index("-n") + 1] == str(gpu_stages.TEST_WORKERS)
    found.clear()
    assert "-n" not in command()


def test_every_test_that_asks_for_a_gpu_is_run():
    """By what the files say: the devices of op_checks, or the reason of a skip."""
    files = set()
    for path in (REPOSITORY / "python_tests").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        of_gpus = re.findall(
            r'reason="needs a GPU"\)$.*?^def (\w+)', text, re.MULTILINE | re.DOTALL
        )
        for name in of_gpus:
            test = f"{path.name}::{name}"
            assert any(word in test for word in gpu_stages.GPU_TEST_WORDS), test
        imported = r"^from op_checks import (?:\([^)]*|.*)\bDEVICE(?:S|_DTYPES)\b"
        if of_gpus or re.search(imported, text, re.MULTILINE):
            files.add(path.stem.removeprefix("test_"))
    assert files == set(gpu_stages.GPU_TESTS)


def test_build_is_for_this_gpu_where_machine_code_is_shipped():
    assert "-DMETRO_CUDA_ARCHITECTURES=90a-real" in gpu_stages.build_commands((9, 0))[0]
    assert not any("ARCHITECTURES" in word for word in gpu_stages.build_commands((12, 0))[0])


@pytest.mark.parametrize(
    "read, output, reason",
    [
        (gpu_stages.checks, '{"checks": {}}', "no check was made"),
        (gpu_stages.sanitizer, "========= ERROR SUMMARY: 0 errors", "no check was made"),
        (gpu_stages.benchmark, "Traceback", "no case was measured"),
    ],
)
def test_a_stage_that_checked_nothing_has_not_passed(tmp_path, read, output, reason):
    result = run(Stage("empty", [python(f"print({output!r})")], 30, read), tmp_path)
    assert result["status"] == FAILED and reason in result["reason"]


def test_the_sanitizer_s_output_is_read(tmp_path):
    lines = '========= COMPUTE-SANITIZER\\n{"checks": {"a": "ok", "b": "bad"}}\\n'
    lines += "========= ERROR SUMMARY: 2 errors"
    code = f"print('{lines}'); raise SystemExit(86)"
    result = run(sanitizer_stage(tmp_path, code), tmp_path)
    assert result["status"] == FAILED and result["reason"] == "the sanitizer found errors"
    assert result["summary"] == "ERROR SUMMARY: 2 errors"
    assert (result["held"], result["wrong"]) == (1, {"b": "bad"})


def test_tests_are_counted(tmp_path):
    source, report = tmp_path / "test_it.py", tmp_path / "tests.xml"
    source.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "def test_absent(): pytest.skip('no')\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider",
               f"--junitxml={report}", str(source)]  # fmt: skip
    result = run(Stage("t", [command], 30, lambda _: gpu_stages.test_counts(report)), tmp_path)
    assert result["status"] == FAILED  # pytest's own exit code
    assert (result["passed"], result["failed"], result["skipped"]) == (1, ["test_it::test_bad"], 1)
    report.write_text("<testsuites><testsuite/></testsuites>")
    with pytest.raises(ValueError, match="no test ran"):
        gpu_stages.test_counts(report)


@pytest.fixture
def some_gpu(tmp_path, monkeypatch):
    """As on a machine whose GPU is there for this process and lost to the stage's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU (80 GB)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_record_is_written_though_a_stage_fails(tmp_path, some_gpu, capsys):
    assert gpu_check.main(["--stages", "equality"]) == 1
    record = json.loads((tmp_path / "gpu_check-some-gpu-80-gb.json").read_text())
    assert record["device"] == "Some GPU (80 GB)" and record["torch"] == torch.__version__
    assert {"date", "commit", "cuda", "capability"} <= set(record)
    (stage,) = record["stages"]
    assert stage["status"] == FAILED and stage["held"] == 0 and stage["wrong"]
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["commit"] == record["commit"] and line["machine"]["torch"] == torch.__version__
    assert line["stages"] == {"equality": FAILED} and line["cases"] == []
    assert all(target["found"] is target["met"] is None for target in record["targets"])


def test_the_last_line_has_the_cases_of_all_stages():
    stages = [
        {"name": "build", "status": PASSED},
        {"name": "step", "status": PASSED, "record": {"cases": [{"name": "a", "ours": 1.0}]}},
        {"name": "ops:gelu", "status": PASSED, "record": {"cases": [{"name": "b", "ours": 2.0}]}},
    ]
    line = json.loads(gpu_check.last_line({"script": "gpu_check", "stages": stages}))
    assert line["script"] == "gpu_check"
    assert [case["name"] for case in line["cases"]] == ["a", "b"]


def test_it_begins_before_the_extension_is_built(tmp_path):
    """On a machine that just got the tree it is the check itself that builds."""
    for folder in ("bench", "metro_ext"):
        shutil.copytree(
            REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "results")
        )
    command = [sys.executable, "bench/gpu_check.py", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--stages" in done.stdout, done.stderr


def test_its_families_are_those_of_the_cases():
    from bench.cases import FAMILIES

    assert tuple(FAMILIES) == gpu_stages.FAMILIES
