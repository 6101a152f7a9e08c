"""The CUDA kernels of attention on the CPU emulation, against the float64 reference."""

import numpy as np
import pytest
import reference
import torch
from emulation import EmulationError, emulated
from op_checks import assert_close, relative_error

from metro_ext.ops import attention as cpu_attention

SEED = -6148914691236517205
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case:
    """Random inputs of one call; ``lengths`` are those of the packed sequences."""

    def __init__(self, lengths, heads, head_dim, dtype, with_bias, p):
        generator = torch.Generator().manual_seed(sum(lengths) + head_dim)
        self.lengths, self.p = lengths, p
        self.max_seqlen = max(lengths, default=0) + 3
        self.qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator).to(dtype)
        width = 2 * self.max_seqlen - 1
        self.bias = torch.randn(heads, width, generator=generator) if with_bias else None
        self.boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)

    def arguments(self):
        tokens, _, heads, head_dim = self.qkv.shape
        return {
            "qkv": self.qkv,
            "cu_seqlens": self.boundaries,
            "bias": self.bias,
            "seed": torch.tensor([SEED]) if self.p else None,
            "out": torch.empty(tokens, heads, head_dim, dtype=self.qkv.dtype),
            "lse": torch.empty(heads, tokens),
            "tokens": tokens,
            "sequences": len(self.lengths),
            "heads": heads,
            "head_dim": head_dim,
            "max_seqlen": self.max_seqlen,
            "p": self.p,
            "draw": 5,
            "dtype": self.qkv.dtype,
        }

    def forward(self, **options):
        done = emulated("attention").run(
            "attention", written=("out", "lse"), **options, **self.arguments()
        )
        return done["out"], done["lse"]

    def backward(self, grad_out, out, lse, bias_rows=2, **options):
        """``bias_rows``: of partial sums, fewer than there are query tiles in most cases."""
        tokens, _, heads, _ = self.qkv.shape
        with_bias = self.bias is not None
        bias_rows = bias_rows if tokens and with_bias else 0
        done = emulated("attention").run(
            "attention_backward",
            written=("grad_qkv", "grad_bias", "bias_partials", "delta"),
            **options,
            **self.arguments() | {"out": out, "lse": lse},
            grad_out=grad_out,
            grad_qkv=torch.empty_like(self.qkv),
            grad_bias=torch.empty_like(self.bias) if with_bias else None,
            bias_partials=torch.empty(bias_rows, *self.bias.shape) if with_bias else None,
            bias_rows=bias_rows,
            delta=torch.empty(heads, tokens),
        )
        return [done["grad_qkv"], *([done["grad_bias"]] if with_bias else [])]

    def inputs(self):
        """qkv and the bias in float64, to be differentiated by."""
        given = [self.qkv] if self.bias is None else [self.qkv, self.bias]
        return [t.double().requires_grad_() for t in given]

    def expected(self, qkv, bias=None):
        return reference.attention(qkv, bias, self.lengths, self.max_seqlen, SEED, self.p, 5)


# lengths, heads, head dimension, with a bias, dropout: each size that a kernel is compiled for and
# one that is padded, each odd length of a tile, empty sequences, both switches both ways.
CASES = [
    ([1, 0, 130, 63], 2, 64, True, 0.1),
    ([5, 65], 1, 32, True, 0.0),
    ([64, 0, 0], 1, 128, False, 0.7),
    ([70], 1, 96, False, 0.0),
    ([70, 2], 1, 32, False, 0.2),
    ([66], 1, 24, True, 1.0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, heads, head_dim, with_bias, p", CASES)
def test_matches_reference(lengths, heads, head_dim, with_bias, p, dtype):
    case = Case(lengths, heads, head_dim, dtype, with_bias, p)
    inputs = case.inputs()
    out, lse = case.forward()
    expected_out, expected_lse = case.expected(*inputs)
    assert_close(lse, expected_lse, dtype, "lse")
    assert_close(out, expected_out, dtype, "output")
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    grads = case.backward(grad_out, out, lse)
    expected = torch.autograd.grad(expected_out, inputs, grad_out.double())
    for index, (a, b) in enumerate(zip(grads, expected, strict=True)):
        assert_close(a, b, dtype, f"gradient of input {index}")


@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype, lengths):
    case = Case(lengths, 2, 32, dtype, True, 0.1)
    out, lse = case.forward()
    assert out.shape == (0, 2, 32) and lse.shape == (2, 0)
    grad_qkv, grad_bias = case.backward(out, out, lse)
    assert grad_qkv.shape == case.qkv.shape
    assert torch.equal(grad_bias, torch.zeros_like(case.bias))


def test_a_grid_too_large_is_refused():
    with pytest.raises(EmulationError):
        Case([1], 65536, 8, torch.float32, False, 0.0).forward()


def test_blocks_take_turns():
    """Many short sequences are more tiles than there are blocks, and far more than rows of sums."""
    lengths = [3] * 12 + [0, 130, 0, 1, 65] + [2] * 9 + [0] * 40
    case = Case(lengths, 2, 32, torch.bfloat16, True, 0.1)
    inputs = case.inputs()
    out, lse = case.forward()
    expected, expected_lse = case.expected(*inputs)
    assert_close(out, expected, torch.bfloat16, "output")
    assert_close(lse, expected_lse, torch.bfloat16, "lse")
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    grads = case.backward(grad_out, out, lse, bias_rows=3)
    expected_grads = torch.autograd.grad(expected, inputs, grad_out.double())
    for a, b, name in zip(grads, expected_grads, ("qkv", "bias"), strict=True):
        assert_close(a, b, torch.bfloat16, name)


def test_one_of_a_thousand_sequences_is_found():
    """Where the search for a tile's sequence goes several rounds."""
    lengths = [0] * 1100
    for index in (0, 31, 32, 33, 500, 1023, 1024, 1099):
        lengths[index] = index % 7 + 1
    case = Case(lengths, 1, 32, torch.float32, True, 0.0)
    out, _ = case.forward()
    assert_close(out, case.expected(*case.inputs())[0], torch.float32, "output")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fits_where_a_block_has_less_shared_memory(dtype):
    """With 99 KB the next tiles are not copied ahead: the same sums, and so the same bits."""
    case = Case([130, 7], 1, 128, dtype, True, 0.1)
    out, lse = case.forward(shared_bytes=99 << 10)
    less = case.backward(out, out, lse, shared_bytes=99 << 10)
    for a, b in zip(less, case.backward(out, out, lse), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_tells_how_much_shared_memory_it_needs(head_dim, dtype):
    case = Case([3], 1, head_dim, dtype, False, 0.0)
    out, lse = case.forward()

    def backward(**options):
        case.backward(out, out, lse, **options)

    told = (
        emulated("attention")
        .run(
            "attention_shared_memory",
            shared_bytes=99 << 10,
            bytes=torch.zeros(2, 2, dtype=torch.int64),
            **case.arguments(),
        )["bytes"]
        .tolist()
    )
    for (needed, available), call in zip(told, (case.forward, backward), strict=True):
        assert available == 99 << 10
        assert needed <= available or (dtype == torch.float32 and head_dim >= 96)
        call(shared_bytes=needed)
        if needed > 48 << 10:  # else no launch asks
            with pytest.raises(EmulationError, match="CUDA error"):
                call(shared_bytes=needed - 1)


def test_float32_of_long_sequences():
    """Sums that tensor cores cut off are kept short: no worse than twice torch's float32, or 6e-7.

    Long ones would lose 1e-8 a key, 4e-6 here.
    """
    case = Case([512], 1, 32, torch.float32, True, 0.0)
    case.qkv[:, 2] += 1  # sums that grow steadily
    inputs = case.inputs()
    out, lse = case.forward()
    expected, _ = case.expected(*inputs)
    single = [t.float().detach().requires_grad_() for t in inputs]
    torch_out = _in_torch(*single, case.max_seqlen)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)) + 1
    grads = case.backward(grad_out, out, lse)
    expected_grads = torch.autograd.grad(expected, inputs, grad_out.double())
    torch_grads = torch.autograd.grad(torch_out, single, grad_out)
    ours, theirs = [out, *grads], [torch_out, *torch_grads]
    for a, b, exact in zip(ours, theirs, [expected, *expected_grads], strict=True):
        assert relative_error(a, exact) < max(2 * relative_error(b, exact), 6e-7)


def _in_torch(qkv, bias, max_seqlen):
    """One sequence, in the type of ``qkv``."""
    tokens, _, _, head_dim = qkv.shape
    q, k, v = qkv.permute(1, 2, 0, 3)
    place = torch.arange(tokens)
    scores = q @ k.transpose(-1, -2) / head_dim**0.5
    scores = scores + bias[:, place - place[:, None] + max_seqlen - 1]
    return (scores.softmax(-1) @ v).transpose(0, 1)


def test_dropout_keeps_what_the_cpu_keeps():
    """One-hot values make out show every probability: zeros stand where the CPU's stand."""
    length = 130
    case = Case([3, length], 1, 128, torch.float32, False, 0.5)
    for first in (0, length - 128):
        case.qkv[3:, 2] = 0
        case.qkv[3 + first : 3 + first + 128, 2, 0] = torch.eye(128)
        out, _ = case.forward()
        on_cpu = cpu_attention(
            case.qkv,
            case.boundaries,
            None,
            case.max_seqlen,
            seed=torch.tensor([SEED]),
            p=0.5,
            draw=5,
        )
        zeros = out[3:] == 0
        assert torch.equal(zeros, on_cpu[3:] == 0)
        assert 0.4 < zeros.float().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bitwise_in_any_order_of_threads(dtype):
    case = Case([130, 7], 1, 32, dtype, True, 0.1)
    results = []
    for order in ("forward", "reverse"):
        out, lse = case.forward(order=order)
        results.append([out, lse, *case.backward(out, out, lse, order=order)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_bias_of_minus_infinity_masks():
    case = Case([150], 1, 32, torch.float32, True, 0.0)
    centre = case.max_seqlen - 1
    case.bias[:, : centre - 10] = -torch.inf  # the first tiles of late rows are masked whole
    case.bias[:, centre + 11 :] = -torch.inf
    out, lse = case.forward()
    expected_out, expected_lse = case.expected(*case.inputs())
    assert_close(out, expected_out, torch.float32, "output")
    assert_close(lse, expected_lse, torch.float32, "lse")
