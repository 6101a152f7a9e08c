"""The CUDA kernels of vocab_head, emulated: against float64, and the CPU's samples bit for bit."""

import pytest
import torch
from emulation import DTYPES, emulated
from op_checks import assert_close

from metro_ext.ops import vocab_head

DRAW, SEED = 5, torch.tensor([2**40 + 7])
CASES = [(3, 7, 256), (5, 1000, 512), (2, 1032, 1032), (9, 513, 256)]  # rows, vocabulary, tile


def make_inputs(rows, vocab, dtype):
    generator = torch.Generator().manual_seed(rows)
    logits = (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    bias = torch.randn(vocab, generator=generator)
    target = torch.randint(vocab, (rows,), generator=generator)
    target[::2] = (logits.float() + bias).argmax(1)[::2]
    target[1] = -100
    return logits, bias, target


def forward(logits, bias, target, tile, order="forward", seed=SEED, temperature=1.0):
    rows, vocab = logits.shape
    tensors = {
        "state": torch.empty(rows, 4, dtype=torch.int64),
        "nll": torch.empty(rows),
        "lse": torch.empty(rows),
        "hit": torch.empty(rows, dtype=torch.uint8),
        "sample": torch.empty(rows, dtype=torch.int64),
    }
    for begin in range(0, vocab, tile):
        part = logits[:, begin : begin + tile].contiguous()
        given = {"logits": part, "bias": bias, "target": target, "seed": seed, **tensors}
        numbers = {"rows": rows, "begin": begin, "cols": part.shape[1], "vocab": vocab,
                   "temperature": temperature, "draw": DRAW, "dtype": logits.dtype}  # fmt: skip
        run = emulated("vocab_head").run("vocab_head_tile_pass", **given, **numbers, order=order)
        tensors = {name: run[name] for name in tensors}
    return tensors


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("rows, vocab, tile", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype, rows, vocab, tile, temperature):
    logits, bias, target = make_inputs(rows, vocab, dtype)
    out = forward(logits, bias, target, tile, temperature=temperature)
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
    again = forward(logits, bias, target, tile, "reverse", temperature=temperature)
    for name in ("nll", "lse", "hit", "sample"):
        assert torch.equal(again[name], out[name]), name


def test_first_index_at_ties():
    logits, bias = torch.zeros(3, 1000), torch.zeros(1000)
    bias[[300, 301, 900]] = 1.0
    hit = forward(logits, bias, torch.tensor([300, 301, 900]), 512, seed=None)["hit"]
    assert hit.tolist() == [1, 0, 0]


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("rows, vocab, begin", [(3, 7, 0), (35, 519, 256), (9, 264, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(dtype, rows, vocab, begin, order):
    logits, bias, target = make_inputs(rows, vocab, dtype)
    z = (logits.double() + bias.double()).requires_grad_()
    grad = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(z, target, reduction="none")
    (expected,) = torch.autograd.grad(loss @ grad.double(), z)
    part = logits[:, begin:].contiguous()
    got = emulated("vocab_head").run(
        "vocab_head_grad_tile", logits=part, grad_nll=grad, bias=bias, target=target,
        lse=z.detach().logsumexp(1).float(), grad_bias=torch.zeros(vocab),
        partials=torch.empty(2, part.shape[1]), rows=rows, begin=begin, cols=part.shape[1],
        dtype=dtype, order=order, written=("partials",),
    )  # fmt: skip
    assert_close(got["logits"], expected[:, begin:], dtype, "gradient of the logits")
    columns = expected.sum(0)[begin:]
    assert_close(got["grad_bias"][begin:], columns, torch.float32, "gradient of the bias")


@pytest.mark.parametrize("count", [1, 7, 2056])  # 2056: 16-byte accesses, more than a block
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_tiles_add_up(dtype, count):
    generator = torch.Generator().manual_seed(count)
    products = torch.randn(3, count, generator=generator).to(dtype)
    expected = products.float()[0] + products.float()[1] + products.float()[2]
    memory = {"sum": torch.empty(count), "out": torch.empty(count, dtype=dtype)}
    for i, product in enumerate(products):
        memory = emulated("vocab_head").run(
            "vocab_head_accumulate", product=product, **memory, count=count, first=int(i == 0),
            last=int(i == 2), dtype=dtype, written=("sum", "out") if i == 0 else (),
        )  # fmt: skip
        memory = {name: memory[name] for name in ("sum", "out")}
        assert i == 2 or bool(memory["out"].isnan().all())
    assert torch.equal(memory["sum"], expected)
    assert torch.equal(memory["out"], expected.to(dtype))
