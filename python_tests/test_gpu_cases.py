"""bench/gpu_cases.py and bench/gpu_values.py on the CPU: what runs there, and what is seen."""

import re
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed metro_ext is found before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import gpu_cases, gpu_stages, gpu_values

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("what", ["equality", "repeats", "values", "once"])
def test_every_case_runs_on_the_cpu(what, capsys):
    assert gpu_cases.main([what, "--device", "cpu", "--running-record"]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = gpu_stages.checks(lines[-1])
    assert record["held"] >= 4 and not record["wrong"]
    running = [gpu_stages.checks(line)["held"] for line in lines[:-1]]
    assert running == list(range(1, record["held"] + 1))  # a line after each check


def test_cases_are_chosen_by_family(capsys):
    assert set(gpu_cases.CASES) | set(gpu_cases.OF_ONE_TYPE) == set(gpu_stages.FAMILIES)
    of_all = [name for name, _ in gpu_cases.cases("cuda")]
    of_each = [name for f in gpu_stages.FAMILIES for name, _ in gpu_cases.cases("cuda", [f])]
    assert of_all == of_each and len(set(of_all)) == len(of_all)
    assert gpu_cases.main(["once", "--device", "cpu", "--family", "corruption", "loss"]) == 0
    checks = gpu_stages.last_json(capsys.readouterr().out)["checks"]
    assert {name.split()[0] for name in checks} == {"corruption", "pretrain_loss"}
    with pytest.raises(SystemExit):
        gpu_cases.main(["values", "--device", "cpu", "--family", "loss"])
    assert "--family is of repeats and once, not of values" in capsys.readouterr().err


def test_every_operator_is_run_on_both_paths_of_its_kernel():
    names = [name for name, _ in gpu_cases.cases("cpu")]
    for label in ("layer_norm 97", "layer_norm 768", "bias_gelu 97", "bias_gelu 768", "rtd_head 97",
                  "rtd_head 768", "vocab_head 1031", "vocab_head 17408", "token_table 1031",
                  "bias_gelu_linear 97", "bias_gelu_linear 768"):  # fmt: skip
        assert {f"{label} fp32", f"{label} bf16"} <= set(names)


def test_a_wrong_value_of_the_chunked_head_is_seen(monkeypatch):
    right = gpu_values.reference(*gpu_values._inputs(torch.float32, "cpu"))
    assert set(right) == {"nll", "lse", *(f"gradient of {n}" for n in ("hidden", "weight", "bias"))}
    assert gpu_values.difference(right, right, 1e-9) == "ok"
    for name, value in right.items():
        wrong = value.clone()
        wrong[-1] = torch.nan
        assert gpu_values.difference(right | {name: wrong}, right, 0.5).startswith(f"{name}: rel")
    ours = gpu_values.vocab_head
    calls = iter((0, 1))  # the device's seed differs from the CPU's
    monkeypatch.setattr(
        gpu_values, "vocab_head", lambda *given: ours(*given[:-1], given[-1] + next(calls))
    )
    assert "differ between cpu and cpu" in gpu_values._compare_samples(torch.float32, "cpu")


def test_the_chunked_head_takes_more_than_one_chunk_on_either_device():
    """The constants of csrc/vocab_head/vocab_head_op.cpp."""
    source = (REPOSITORY / "csrc" / "vocab_head" / "vocab_head_op.cpp").read_text()
    for device, name in (("cpu", "kChunkElements"), ("cuda", "kCudaChunkElements")):
        (factor, shift) = re.search(rf" {name} = int64_t{{(\d+)}} << (\d+);", source).groups()
        assert gpu_values.ROWS[device] * gpu_values.VOCAB > int(factor) << int(shift)


def test_attention_has_blocks_with_several_tiles_and_several_in_a_row_of_the_bias_gradient():
    """By the constants and the sizes of csrc/attention."""
    header = (REPOSITORY / "csrc" / "attention" / "attention.h").read_text()
    (tile,) = re.findall(r" kAttentionTile = (\d+);", header)
    (bias_rows,) = re.findall(r" kAttentionBiasRows = (\d+);", header)
    cu_seqlens = gpu_values.attention_inputs("cpu")[2]
    assert (cu_seqlens[-gpu_values.EMPTY - 1 :] == cu_seqlens[-1]).all()
    lengths = gpu_values.attention_lengths()
    tiles = -(-lengths // int(tile))
    assert lengths.max() == gpu_values.LONGEST and 0 in lengths[: -gpu_values.EMPTY]
    assert tiles.sum() > 2 * int(bias_rows)


def test_a_wrong_value_of_attention_is_seen(monkeypatch):
    given = gpu_values.attention_inputs("cpu")
    right = gpu_values.attention_values(*given)
    inputs = ("queries", "keys", "values", "bias")
    assert list(right) == ["out", *(f"gradient of {name}" for name in inputs)]
    right = {name: value.float() for name, value in right.items()}
    assert gpu_values.attention_difference(right, right) == "ok"
    for name, value in right.items():
        wrong = value.clone()
        wrong[0] *= 1.5  # one of thirty thousand tokens
        found = gpu_values.attention_difference(right | {name: wrong}, right)
        assert found.startswith(f"{name}: relative error")
    calls = iter(range(10**6))  # a call depends on the calls before it, the device's on the CPU's
    ours = gpu_values.attention
    monkeypatch.setattr(
        gpu_values, "attention", lambda *a, seed, p: ours(*a, seed=seed + next(calls), p=p)
    )
    assert gpu_values._compare_repeated_attention("cpu") == "out differs between two calls"
    assert gpu_values._compare_attention("cpu").startswith("out: relative error")


def test_a_difference_is_seen(monkeypatch, capsys):
    """As if the second device drew with another seed, and as if a call depended on the calls."""
    calls = iter(range(10**6))
    monkeypatch.setattr(gpu_cases, "_key", lambda device: torch.tensor(next(calls)))
    assert gpu_cases.main(["equality", "--device", "cpu"]) == 1
    wrong = gpu_stages.checks(capsys.readouterr().out)["wrong"]
    assert set(wrong) == set(gpu_cases.DRAWS)
    assert gpu_cases.main(["repeats", "--device", "cpu"]) == 1
    wrong = gpu_stages.checks(capsys.readouterr().out)["wrong"]
    assert "layer_norm 768 bf16" in wrong and "bias_gelu 768 bf16" not in wrong


def test_a_broken_operator_does_not_hide_the_others(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("launch failed\nmore")

    monkeypatch.setattr(gpu_cases, "_loss", broken)
    assert gpu_cases.main(["once", "--device", "cpu"]) == 1
    record = gpu_stages.checks(capsys.readouterr().out)
    assert record["wrong"] == {"pretrain_loss": "RuntimeError: launch failed"}
    assert record["held"] > 20
