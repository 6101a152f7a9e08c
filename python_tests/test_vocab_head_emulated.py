"""The CUDA kernels of vocab_head, emulated: against float64, and the CPU's samples bit for bit."""

import pytest
import torch
from emulation import DTYPES, emulated
from op_checks import assert_close

from metro_ext.ops import vocab_head

DRAW, SEED = 5, torch.tensor([2**40 + 7])
# Rows and vocabulary: less than a sample tile, 16-byte loads or not, more than the 64 sample tiles
# that a block takes at a time.
CASES = [(3, 7), (5, 1000), (2, 1032), (9, 513), (2, 17000)]


def make_inputs(rows, vocab, dtype):
    generator = torch.Generator().manual_seed(rows)
    logits = (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    bias = torch.randn(vocab, generator=generator)
    target = torch.randint(vocab, (rows,), generator=generator)
    target[::2] = (logits.float() + bias).argmax(1)[::2]
    target[1] = -100
    return logits, bias, target


def forward(logits, bias, target, order="forward", seed=SEED, temperature=1.0, first_row=0):
    rows, vocab = logits.shape
    out = {
        "nll": torch.empty(rows),
        "lse": torch.empty(rows),
        "hit": torch.empty(rows, dtype=torch.uint8),
        "sample": torch.empty(rows, dtype=torch.int64),
    }
    run = emulated("vocab_head").run(
        "vocab_head_rows", logits=logits, bias=bias, target=target, seed=seed, **out, rows=rows,
        first_row=first_row, vocab=vocab, temperature=temperature, draw=DRAW, dtype=logits.dtype,
        order=order, written=tuple(out) if seed is not None else ("nll", "lse", "hit"),
    )  # fmt: skip
    return {name: run[name] for name in out}


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("rows, vocab", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype, rows, vocab, temperature):
    logits, bias, target = make_inputs(rows, vocab, dtype)
    out = forward(logits, bias, target, temperature=temperature)
    z = logits.double() + bias.double()
    expected = torch.nn.functional.cross_entropy(z, target, reduction="none")
    assert_close(out["nll"], expected, torch.float32, "nll")
    assert_close(out["lse"], z.logsumexp(1), torch.float32, "lse")
    # One-hot rows make the product exact: the CPU operator sees the very same logits.
    given = (logits.bfloat16() if dtype == torch.bfloat16 else logits.float()).T.contiguous()
    unit = torch.eye(rows, dtype=given.dtype)
    cpu = vocab_head(unit, given, bias, target, SEED, temperature, DRAW)
    assert torch.equal(out["sample"], cpu.sample)
    assert torch.equal(out["hit"], cpu.hit)
    again = forward(logits, bias, target, "reverse", temperature=temperature)
    for name in ("nll", "lse", "hit", "sample"):
        assert torch.equal(again[name], out[name]), name


def test_a_later_chunk_draws_as_the_whole():
    logits, bias, target = make_inputs(6, 1000, torch.float32)
    whole = forward(logits, bias, target)["sample"]
    part = forward(logits[4:], bias, target[4:], first_row=4)["sample"]
    assert torch.equal(part, whole[4:])


def test_first_index_at_ties():
    logits, bias = torch.zeros(3, 17000), torch.zeros(17000)
    bias[[300, 301, 16900]] = 1.0
    hit = forward(logits, bias, torch.tensor([300, 301, 16900]), seed=None)["hit"]
    assert hit.tolist() == [1, 0, 0]


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("rows, vocab", [(3, 7), (35, 519), (9, 264)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(dtype, rows, vocab, order):
    logits, bias, target = make_inputs(rows, vocab, dtype)
    z = (logits.double() + bias.double()).requires_grad_()
    loss = 0.25 * torch.nn.functional.cross_entropy(z, target, reduction="sum")
    (expected,) = torch.autograd.grad(loss, z)
    given = dict(
        logits=logits, scale=torch.tensor([0.25]), bias=bias, target=target,
        lse=z.detach().logsumexp(1).float(), partials=torch.empty(2, vocab), rows=rows, vocab=vocab,
        dtype=dtype, order=order,
    )  # fmt: skip
    got = emulated("vocab_head").run(
        "vocab_head_grad", **given, grad_bias=torch.empty(vocab), accumulate=0,
        written=("partials", "grad_bias"),
    )  # fmt: skip
    assert_close(got["logits"], expected, dtype, "gradient of the logits")
    assert_close(got["grad_bias"], expected.sum(0), torch.float32, "gradient of the bias")
    more = emulated("vocab_head").run(
        "vocab_head_grad", **given, grad_bias=torch.ones(vocab), accumulate=1, written=("partials",)
    )
    assert torch.equal(more["grad_bias"], 1 + got["grad_bias"])
