"""bench/report.py: the tables say what the records say, and where a GPU has not been."""

import json
import sys
from pathlib import Path

import pytest

# Last, so that an installed metro_ext is found before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import report, roofline
from bench.harness import Case
from metro_ext.errors import UserError

MACHINE = {"cpu": "Some CPU", "cores": 2, "isa": "avx2", "memory_gb": 1.0, "gpu": "Some GPU",
           "torch": "2.13.0", "python": "3.11.7", "threads": 2}  # fmt: skip
CEILINGS = {"copy GB/s": 10.0, "linear 8x8x8 bf16 GFLOP/s": 400.0, "linear 9x9x9 bf16 GFLOP/s": 500}


def operator(name: str, family: str, gflop: float = 0.0) -> dict:
    return Case(
        name=name,
        ours=2e-3,
        peers={"eager": 3e-3, "half | done": 1e-3, "gone": "absent: not installed"},
        lesser={"half | done": "half of it"},
        floor_seconds=1e-3,
        peak_mb=12.0,
        figures={"family": family, "gb_per_s": 5.0, "gflop_per_s": gflop},
    ).to_json()


def ops(*cases: dict, device: str = "cpu") -> dict:
    return {"script": "ops", "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "device": device,
            "machine": MACHINE, "ceilings": CEILINGS, "cases": list(cases)}  # fmt: skip


def step(device: str) -> dict:
    case = Case(
        "step tiny", 0.5, peers={"hf": 1.0, "compiled": "absent: no compiler"}, floor_seconds=0.25,
        figures={"tokens_per_s": {"ours": 8192.0, "hf": 4096.0}, "mfu": {"ours": 0.41}},
    ).to_json()  # fmt: skip
    return ops(case, device=device) | {"script": "step"}


def gpu_check() -> dict:
    stages = [
        {"name": "equality", "status": "passed", "seconds": 3.2, "held": 5, "wrong": {}},
        {"name": "memcheck", "status": "failed", "seconds": 9.0, "reason": "it broke", "held": 1,
         "wrong": {"bias_gelu bf16": "launch failed"}, "output_tail": "..."},
        {"name": "ops:gelu", "status": "passed", "seconds": 1,
         "record": ops(operator("gelu x", "gelu"), device="cuda")},
        {"name": "ops:attention", "status": "passed", "seconds": 1,
         "record": ops(operator("attention x", "attention", 90.0), device="cuda")},
        {"name": "step", "status": "passed", "seconds": 1, "record": step("cuda")},
    ]  # fmt: skip
    targets = [{"what": "step, tokens/s", "bound": ">= 470000", "found": 512345.0, "met": True},
               {"what": "attention", "bound": ">= 300", "found": None, "met": None,
                "note": "weak"}]  # fmt: skip
    return {"script": "gpu_check", "date": "2026-01-02T03:04:05+00:00", "commit": "abcdef",
            "device": "Some GPU", "torch": "2.13.0", "cuda": "13.0", "stages": stages,
            "targets": targets}  # fmt: skip


def page(folder: Path, **records: dict) -> str:
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    report.main(["--results", str(folder)])
    return (folder / "README.md").read_text()


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]


def section(text: str, title: str) -> str:
    return text.split(f"{title}\n", 1)[1].split("\n#", 1)[0]


def test_operators_on_the_cpu_and_none_on_a_gpu(tmp_path):
    text = page(tmp_path, cpu=ops(operator("attention x", "attention", 90.0)))
    assert row(text, "attention x") == [
        "attention x", "2.000 ms", "50%", "5", "90", "12",
        "eager 1.50x, (half / done 0.50x), gone: absent",
    ]  # fmt: skip
    assert text.count(report.NOT_YET) == 3  # step, operators, checks
    assert "Some CPU, 2 threads" in text and "Some GPU" not in text
    assert (tmp_path / "roofline-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "(roofline-cpu.png)" in text


def test_families_in_files_of_their_own_share_a_plot(tmp_path):
    other = ops(operator("gelu x", "gelu")) | {"machine": MACHINE | {"cpu": "Other CPU"}}
    attention = ops(operator("attention x", "attention", 90.0))
    attention["ceilings"] = CEILINGS | {"copy GB/s": 12.0}
    gelu = ops(operator("gelu y", "gelu"))
    text = page(tmp_path, a=attention, b=gelu, c=other)
    assert row(text, "attention x") and row(text, "gelu y") and row(text, "gelu x")
    assert text.count("(roofline-cpu.png)") == text.count("(roofline-cpu-2.png)") == 1
    first, second = report.operators(report.read(tmp_path))
    assert [case["name"] for case in first.cases] == ["attention x", "gelu y"]
    assert first.ceilings["copy GB/s"] == 12.0 and second.ceilings == CEILINGS


def test_a_gpu_check_fills_every_section(tmp_path):
    text = page(tmp_path, gpu=gpu_check())
    assert report.NOT_YET not in text
    operators = section(text.split("## Operators", 1)[1], "### GPU")
    assert row(operators, "gelu x") and row(operators, "attention x")  # in one table
    assert operators.count("roofline-gpu.png") == 1
    assert row(text, "ours")[1:5] == ["500.0 ms", "8,192", "41.0%", ""]
    assert row(text, "hf")[4] == "2.00x"
    assert row(text, "compiled")[1] == "absent: no compiler"
    assert row(text, "equality") == ["equality", "passed", "3", "5 held"]
    assert row(text, "memcheck")[3] == "it broke; 1 held; not: bias_gelu bf16"
    assert row(text, "step, tokens/s")[1:] == [">= 470000", "512,345", "met"]
    assert row(text, "attention")[1:] == [">= 300", "", "not measured"]
    assert "\nattention: weak.\n" in text
    # The commit of the check is that of its benchmarks, which may not have known theirs.
    assert text.count("commit abcdef") == 3 and "commit abc," not in text


def test_static_evidence_is_a_row_a_kernel(tmp_path):
    kernel = {"registers": 40, "spill_bytes": 0, "tensor_core": 8}
    table = {
        "script": "cuda_resources",
        "nvcc": "13.0.88",
        "kernels": {
            "a/forward<float, 64>": {"sm_80": kernel, "spill_reason": "why"},
            "a/forward<float, 96>": {"sm_80": kernel | {"registers": 50, "spill_bytes": 8}},
        },
    }
    assert row(page(tmp_path, table=table), "a/forward") == [
        "a/forward", "2", "40 - 50", "0 - 8", "8"
    ]  # fmt: skip


def test_other_scripts_show_their_numbers(tmp_path):
    case = Case("books metro", 3.0, figures={"loss": 2.5, "command": "python"}).to_json()
    text = page(tmp_path, books=ops(case) | {"script": "books"}, odd={"anything": 1})
    assert row(text, "books metro") == ["books metro", "3.000 s", "", "loss 2.5"]
    assert "`odd.json`" in text


def test_growth_is_a_row_an_axis(tmp_path):
    fits = {"time_exponent": 0.98, "flops_exponent": 1.0, "memory_exponent": 1.1,
            "planned_exponent": None}  # fmt: skip
    cases = [
        Case(f"tokens {n}", n / 2, peak_mb=1e3 * n, figures={"axis": "tokens", "size": n, **fits})
        for n in (2, 8)
    ]
    text = page(tmp_path, big=ops(*(c.to_json() for c in cases)) | {"script": "growth"})
    cells = ["tokens", "2; 8", "1.000 s; 4.000 s", "0.98", "1.00", "2,000; 8,000", "1.10", ""]
    assert row(text, "tokens") == cells
    assert "![Time and memory by size](big.png)" in text


def test_mistakes_get_a_sentence(tmp_path):
    with pytest.raises(UserError, match="there are no results"):
        report.read(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match=r"list.json: expected a JSON object, found list"):
        report.read(tmp_path)
    (tmp_path / "list.json").write_text("{")
    with pytest.raises(UserError, match=r"list.json is not JSON"):
        report.read(tmp_path)


def test_roofline_places_what_has_products():
    cases = [operator("attention x", "attention", 90.0), operator("gelu x", "gelu")]
    assert roofline.matrix_roofs(CEILINGS) == {"bf16": 500}
    assert roofline.intensity(cases[0]) == 18.0
    left, right = roofline.figure_of(cases, CEILINGS, "a title").axes
    (points,) = left.collections
    assert points.get_offsets().tolist() == [[18.0, 90.0]]
    (roof,) = left.lines
    x, y = roof.get_data()
    assert y.max() == 500 and y[0] == pytest.approx(10 * x[0])
    assert [bar.get_width() for bar in right.patches] == [50.0, 50.0]


def test_the_project_s_own_results_can_be_reported(tmp_path):
    output = tmp_path / "README.md"
    report.main(["--output", str(output)])
    text = output.read_text()
    assert "attention_backward/grad_key_kernel" in text and "books-10m" in text
