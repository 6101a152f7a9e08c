"""The record of bench/gpu_check.py: gone on with in a second call, and measured by the targets."""

import json
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed metro_ext is found before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import gpu_check, gpu_stages
from bench.gpu_check import FAILED, LEFT_OUT, PASSED, TIMED_OUT
from bench.gpu_stages import Stage
from bench.gpu_targets import TARGETS, target_lines, targets
from bench.harness import Case, sources
from metro_ext.errors import UserError

GOOD = "import json; print(json.dumps({'checks': {'a': 'ok'}}))"


def python(code: str) -> list[list[str]]:
    return [[sys.executable, "-c", code]]


def result(name: str, status: str, **details) -> dict:
    return {"name": name, "status": status, **details}


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU by name, and three stages: one that passes, one too long for its limit, one that is
    right only where the file ``mended`` is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    mended, log = tmp_path / "mended", tmp_path / "log"
    note = "open({!r}, 'a').write({!r}); "

    def stages(capability, folder, full):
        checks = gpu_stages.checks
        code = GOOD + f"; import os; exit(not os.path.exists({str(mended)!r}))"
        return [
            Stage("build", python(note.format(str(log), "b")), 300),
            Stage("equality", python(note.format(str(log), "e") + GOOD), 300, checks),
            Stage("tests", python(note.format(str(log), "t") + code), 300, checks),
            Stage("step", python(note.format(str(log), "s") + GOOD), 10**6, checks),
        ]

    monkeypatch.setattr(gpu_check, "stages", stages)
    return tmp_path


def read(path: Path) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in json.loads(path.read_text())["stages"]}


def test_a_second_call_goes_on_with_what_did_not_pass(gpu, capsys):
    path = gpu / "gpu_check-some-gpu.json"
    assert gpu_check.main(["--commit", "abc"]) == 1
    assert read(path) == {"build": PASSED, "equality": PASSED, "tests": FAILED, "step": LEFT_OUT}
    assert json.loads(path.read_text())["commit"] == "abc"
    assert (gpu / "log").read_text() == "bet"
    (gpu / "mended").touch()
    # From another folder, as on a machine that got the record with the tree; the build runs again.
    carried = gpu / "carried.json"
    path.rename(carried)
    (gpu / "out").mkdir()
    words = ["--resume", str(carried), "--seconds", str(2 * 10**6), "--output"]
    assert gpu_check.main([*words, str(gpu / "out" / "all.json")]) == 0
    assert (gpu / "log").read_text() == "bet" + "bts"
    record = json.loads((gpu / "out" / "all.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["build", "equality", "tests", "step"]
    assert {stage["status"] for stage in record["stages"]} == {PASSED}
    assert all("date" in stage for stage in record["stages"])
    assert read(carried)["tests"] == FAILED  # as it was
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["stages"]["step"] == PASSED
    # Stages that are named run again, whatever the record says of them.
    assert gpu_check.main(["--stages", "tests", *words, str(gpu / "out" / "all.json")]) == 1
    assert (gpu / "log").read_text() == "bet" + "bts" + "t"
    assert read(gpu / "out" / "all.json")["step"] == LEFT_OUT


def test_stages_that_are_named_may_take_all_the_seconds(gpu, monkeypatch):
    limits = {}

    def run_stage(stage: Stage, seconds: float, folder: Path) -> dict:
        limits[stage.name] = seconds
        return result(stage.name, PASSED)

    monkeypatch.setattr(gpu_check, "run_stage", run_stage)
    gpu_check.main(["--seconds", "9000"])
    assert limits == {"build": 300, "equality": 300, "tests": 300}
    gpu_check.main(["--seconds", "9000", "--stages", "tests"])
    assert 8000 < limits["tests"] <= 9000


def test_a_call_does_not_go_on_with_another_s_record(gpu):
    path = gpu / "gpu_check-some-gpu.json"
    with pytest.raises(UserError, match=r"--resume: .* cannot be read: No such file"):
        gpu_check.main(["--resume"])
    gpu_check.main(["--stages", "equality"])
    record = json.loads(path.read_text())
    assert record["sources"] == sources()
    for key, other in (("device", "Other GPU"), ("torch", "1.0"), ("sources", "0"), ("full", True)):
        path.write_text(json.dumps(record | {key: other}))
        with pytest.raises(UserError, match=f"the record is of {key} {other!r}, this call of "):
            gpu_check.main(["--resume"])
    for text, message in (("{", "is not JSON"), ('{"script": "ops"}', "is not a record of")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            gpu_check.main(["--resume"])
    with pytest.raises(UserError, match="--output: there is no folder"):
        gpu_check.main(["--output", str(gpu / "nowhere" / "x.json")])


@pytest.mark.parametrize(
    "earlier, later, kept",
    [
        (PASSED, LEFT_OUT, "earlier"),
        (TIMED_OUT, LEFT_OUT, "earlier"),
        (LEFT_OUT, LEFT_OUT, "later"),
        (LEFT_OUT, TIMED_OUT, "later"),
        (FAILED, TIMED_OUT, "earlier"),
        (PASSED, FAILED, "later"),
        (FAILED, PASSED, "later"),
        (TIMED_OUT, PASSED, "later"),
    ],
)
def test_the_later_result_counts_unless_it_says_less(earlier, later, kept):
    every = [Stage("b", [], 1), Stage("a", [], 1)]
    found = gpu_check.merged(
        every, [result("a", earlier, tag="earlier")], [result("a", later, tag="later")]
    )
    assert [r["tag"] for r in found] == [kept]


def test_of_two_that_were_cut_off_the_one_with_more_cases_counts():
    every = [Stage("b", [], 1), Stage("a", [], 1)]
    one, two = ({"record": {"cases": [{}] * n}} for n in (1, 2))
    for before, now, cases in ((one, two, 2), (two, one, 2)):
        found = gpu_check.merged(
            every, [result("a", TIMED_OUT, **before)],
            [result("b", PASSED), result("a", TIMED_OUT, **now)],
        )  # fmt: skip
        assert [r["name"] for r in found] == ["b", "a"]  # in the order of the whole
        assert len(found[1]["record"]["cases"]) == cases


def test_the_sources_are_known_by_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.harness.REPOSITORY", tmp_path)
    for name in ("csrc/a/x.cu", "metro_ext/y.py", "metro_ext/_C.so", "CMakeLists.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    first = sources()
    (tmp_path / "metro_ext" / "_C.so").write_text("built anew")
    assert sources() == first
    for name in ("csrc/a/x.cu", "metro_ext/y.py", "CMakeLists.txt"):
        (tmp_path / name).write_text("changed")
        assert sources() != first
        (tmp_path / name).write_text(name)
    (tmp_path / "metro_ext" / "y.py").rename(tmp_path / "metro_ext" / "z.py")
    assert sources() != first


def test_targets_are_of_cases_that_the_benchmarks_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    from bench import step
    from bench.cases import all_cases

    names = {f"{case.name} {dtype} {mode}" for case in all_cases("cuda", False)
             for dtype in case.dtypes for mode in case.modes}  # fmt: skip
    options = step.parse(gpu_stages.STEP)
    options.device = "cuda"
    times = {"ours": [1.0]}
    case = step._case(options, times, floor_rate=1.0, absent={}, peaks={"ours": 1.0}, figures={})
    assert {target.case for target in TARGETS} <= {*names, case.name}


def stage_of(*cases: Case) -> dict:
    return result("x", PASSED, record={"cases": [case.to_json() for case in cases]})


def test_targets_are_looked_up_in_the_record():
    attention = [
        Case(
            f"attention 64x512x12x64 bf16 {mode}", ours=1.0,
            peers={"ours no bias": no_bias, "flex attention": flex},
            figures={"gflop_per_s": 310e3, "flash_gflop_per_s": 240e3},
        )
        for mode, no_bias, flex in (
            ("forward", 0.8, 2.0), ("backward", 0.95, 2.0), ("forward + backward", 1.0, 1.3)
        )
    ]  # fmt: skip
    head = Case("vocab_head 10240x768x65536 sampled bf16 forward", 1.04, {"ours no sample": 1.0})
    norm = Case("layer_norm 32768x768 residual bf16 backward", 1.0, floor_seconds=0.8)
    step = Case(
        "step 12x768 aux 4x768 vocabulary 65536 tokens 64x512 bf16 cuda", ours=0.08,
        peers={"hf eager masters": 0.1, "hf compiled masters": 0.09, "hf compiled x": "absent: y"},
        figures={"tokens_per_s": {"ours": 400e3}, "mfu": {"ours": 0.35},
                 "ours_graphed_seconds": 0.064},
    )  # fmt: skip
    found = {t["what"]: t for t in targets([stage_of(*attention), stage_of(head, norm, step)])}
    expected = {
        "attention forward, TFLOP/s": (310, True),
        "attention backward, TFLOP/s": (240, False),
        "attention forward, time over that without a bias": (1.25, False),
        "attention backward, time over that without a bias": (1.05263, True),
        "attention, FlexAttention's time over ours": (1.3, True),
        "vocabulary head forward + backward, TFLOP/s": (None, None),
        "vocabulary head forward, what sampling adds, %": (4, True),
        "LayerNorm (residual) backward, % of copy bandwidth": (80, True),
        "LayerNorm (residual) forward, % of copy bandwidth": (None, None),
        "base++ step, tokens/s": (500e3, True),
        "base++ step, MFU, %": (43.75, True),
        "base++ step, Hugging Face compiled over ours": (0.09 / 0.064, False),
    }
    for what, (value, met) in expected.items():
        assert found[what]["met"] is met, what
        assert found[what]["found"] == (None if value is None else pytest.approx(value, rel=1e-5))
    lines = "\n".join(target_lines(found.values()))
    assert lines.count("not measured") == 4 and "met" in lines and "missed" in lines
    noted = [what for what, target in found.items() if "note" in target]
    assert noted == ["attention forward, time over that without a bias"]
    assert "`sdpa no bias`" in lines


def test_without_a_graph_the_eager_step_counts():
    name = TARGETS[-1].case
    step = Case(name, 0.08, figures={"tokens_per_s": {"ours": 4e5}, "mfu": {"ours": 0.3},
                                     "ours_graphed_seconds": "absent: no"})  # fmt: skip
    found = {t["what"]: t["found"] for t in targets([stage_of(step)])}
    assert found["base++ step, tokens/s"] == 4e5
    assert found["base++ step, Hugging Face compiled over ours"] is None
