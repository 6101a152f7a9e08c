"""The CUDA kernels of attention on the CPU emulation, against the float64 reference."""

import numpy as np
import pytest
import reference
import torch
from emulation import EmulationError, emulated
from op_checks import assert_close

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

    def backward(self, grad_out, out, lse, **options):
        tokens, _, heads, _ = self.qkv.shape
        slots = tokens // 64 + len(self.lengths)  # attention_slots, attention_slot_width
        width = ((self.max_seqlen + 63) // 64 + 1) * 64
        with_bias = self.bias is not None
        done = emulated("attention").run(
            "attention_backward",
            written=("grad_qkv", "grad_bias", "bias_partials", "delta"),
            **options,
            **self.arguments() | {"out": out, "lse": lse},
            grad_out=grad_out,
            grad_qkv=torch.empty_like(self.qkv),
            grad_bias=torch.empty_like(self.bias) if with_bias else None,
            bias_partials=torch.empty(heads, slots, width) if with_bias else None,
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
    """2^24 tiles of 256 sequences are 2^32 blocks, which 32 bits would hold as none."""
    case = Case([1] * 256, 1, 32, torch.float32, False, 0.0)
    case.max_seqlen = 2**30
    with pytest.raises(EmulationError):
        case.forward()


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
