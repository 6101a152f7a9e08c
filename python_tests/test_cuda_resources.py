"""The CI check of registers, spills and tensor-core instructions: it must see what got worse."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "cuda_resources.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not in a checkout")

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Zfirst' for 'sm_80'
ptxas info    : Function properties for _Zfirst
    24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 1088 bytes smem
ptxas info    : Compiling entry function '_Zsecond' for 'sm_80'
ptxas info    : Function properties for _Zsecond
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
DISASSEMBLY = """\
\t.section\t.text._Zfirst,"ax",@progbits
.text._Zfirst:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0020*/                   FFMA R4, R5, R6, R7 ;
.text._Zsecond:
        /*0000*/                   WARPSYNC.ALL ;
"""
ROW = {"registers": 100, "shared_bytes": 0, "stack_bytes": 0, "spill_bytes": 0, "tensor_core": 64}


@pytest.fixture(scope="module")
def resources():
    spec = importlib.util.spec_from_file_location("cuda_resources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels(**changes):
    return {"attention/forward<float, 64>": {"sm_80": ROW | changes, "sm_90a": dict(ROW)}}


def regressions(resources, now, nvcc="13.0", **before):
    return resources.regressions({"nvcc": "13.0", "kernels": kernels(**before)}, now, nvcc)


def test_reads_the_assembler_and_the_disassembler(resources):
    assert resources.ptxas_rows(PTXAS) == {
        "_Zfirst": {
            "registers": 255, "shared_bytes": 1088, "stack_bytes": 24, "spill_bytes": 24
        },
        "_Zsecond": {"registers": 32, "shared_bytes": 0, "stack_bytes": 0, "spill_bytes": 0},
    }  # fmt: skip
    assert resources.tensor_core_counts(DISASSEMBLY) == {"_Zfirst": 2}


@pytest.mark.parametrize(
    "demangled, name",
    [
        (
            "void metro::(anonymous namespace)::grad_kernel<__half, 128>(metro::Params, int)",
            "grad_kernel<__half, 128>",
        ),
        ("void metro::rows<float, (int)96, (bool)1>(float*)", "rows<float, 96, 1>"),
        ("metro::(anonymous namespace)::plain(unsigned char const*)", "plain"),
    ],
)
def test_names_can_be_read(resources, demangled, name):
    assert resources.readable(demangled) == name


def test_the_same_is_not_worse(resources):
    assert regressions(resources, kernels()) == []
    assert regressions(resources, kernels(registers=110)) == []  # within the slack
    assert regressions(resources, kernels(tensor_core=32)) == []


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(registers=111), "registers 100 -> 111"),
        (dict(tensor_core=0), "tensor-core instructions 64 -> 0"),
        (dict(stack_bytes=8), "stack frame 0 -> 8"),
        (dict(spill_bytes=8), "spilled bytes 0 -> 8"),
    ],
)
def test_each_way_to_get_worse_is_named(resources, change, text):
    found = regressions(resources, kernels(**change))
    assert f"attention/forward<float, 64> sm_80: {text}" in found


def test_kernels_must_be_those_of_the_table(resources):
    renamed = {"attention/other": kernels().popitem()[1]}
    assert regressions(resources, renamed) == [
        "attention/forward<float, 64>: in the table, but no longer compiled",
        "attention/other: not in the table",
    ]
    assert regressions(resources, {"attention/forward<float, 64>": {"sm_75": ROW}}) == [
        "attention/forward<float, 64> sm_75: not in the table"
    ]


def test_another_compiler_is_judged_by_spills_and_tensor_cores_alone(resources):
    assert regressions(resources, kernels(registers=200, stack_bytes=8), nvcc="14.0") == []
    assert regressions(resources, kernels(tensor_core=0), nvcc="14.0")


def test_a_spill_needs_a_reason_and_may_not_grow(resources):
    committed = {"nvcc": "13.0", "kernels": kernels(spill_bytes=16)}
    (sentence,) = resources.regressions(committed, kernels(spill_bytes=16), "13.0")
    assert "no spill_reason" in sentence
    for targets in committed["kernels"].values():
        targets["spill_reason"] = "measured faster"
    assert resources.regressions(committed, kernels(spill_bytes=16), "13.0") == []
    assert resources.regressions(committed, kernels(spill_bytes=8), "13.0") == []
    (sentence,) = resources.regressions(committed, kernels(spill_bytes=17), "13.0")
    assert "spilled bytes 16 -> 17" in sentence


def test_update_keeps_the_reason_of_a_spill(resources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resources, "ROOT", tmp_path)
    monkeypatch.setattr(resources, "TABLE", tmp_path / "table.json")
    spilling = kernels(spill_bytes=16)
    with pytest.raises(SystemExit, match="write a spill_reason into the table"):
        resources.update(copy.deepcopy(spilling), "13.0")
    table = json.loads(resources.TABLE.read_text())
    assert table["kernels"] == spilling
    table["kernels"]["attention/forward<float, 64>"]["spill_reason"] = "measured faster"
    resources.TABLE.write_text(json.dumps(table))
    resources.update(copy.deepcopy(spilling), "13.0")
    assert "measured faster" in resources.TABLE.read_text()
    resources.update(kernels(), "13.0")  # no spill, no excuse
    assert "measured faster" not in resources.TABLE.read_text()


def test_the_committed_table_is_in_its_own_form(resources):
    table = json.loads(resources.TABLE.read_text())
    assert resources.TABLE.read_text() == resources.text_of(table["nvcc"], table["kernels"])
    measured = copy.deepcopy(table["kernels"])
    for targets in measured.values():
        targets.pop("spill_reason", None)
    assert resources.regressions(table, measured, table["nvcc"]) == []
