import math

import numpy as np
import pytest
import reference
import torch
from op_checks import (
    DEVICE_DTYPES,
    DEVICES,
    assert_bitwise_repeatable,
    assert_close,
    check_against_reference,
    check_finite_differences,
)

from metro_ext.errors import UserError
from metro_ext.ops import attention, relative_bias

SEED = -6148914691236517205  # every other bit of the key

# lengths of the sequences, heads, head dimension
CASES = [
    ([5], 1, 8),
    ([1, 2], 2, 64),
    ([64], 2, 32),
    ([130, 0, 1, 70, 64, 0, 0], 3, 64),
    ([33, 200], 2, 24),
    ([129], 2, 128),
    ([0, 77, 3, 2], 2, 96),
    ([66], 1, 104),
    ([700], 1, 16),
]


def make_inputs(lengths, heads, head_dim, device, dtype, max_seqlen, with_bias=True):
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator)
    bias = torch.randn(heads, 2 * max_seqlen - 1, generator=generator) if with_bias else None
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return (
        qkv.to(device, dtype),
        bias.to(device) if with_bias else None,
        boundaries.to(device),
        torch.tensor([SEED], device=device),
    )


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("lengths, heads, head_dim", CASES)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_matches_reference(device, dtype, lengths, heads, head_dim, with_bias, p):
    longest = max(lengths) + 3
    qkv, bias, boundaries, seed = make_inputs(
        lengths, heads, head_dim, device, dtype, longest, with_bias
    )

    def op(qkv, bias=None):
        return attention(qkv, boundaries, bias, longest, seed=seed, p=p, draw=5)

    def expected(qkv, bias=None):
        return reference.attention(qkv, bias, lengths, longest, SEED, p, 5)[0]

    inputs = [qkv, bias] if with_bias else [qkv]
    check_against_reference(op, expected, inputs, dtype)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_log_sum_exp(device, dtype):
    lengths = [70, 3]
    qkv, bias, boundaries, _ = make_inputs(lengths, 2, 16, device, dtype, 70)
    qkv.requires_grad_()
    lse = torch.ops.metro.attention(qkv, boundaries, bias, 70, None, 0.0, 0)[1]
    expected = reference.attention(qkv.detach().cpu().double(), bias.cpu().double(), lengths, 70)[1]
    assert lse.dtype == torch.float32 and not lse.requires_grad
    assert_close(lse, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_large_scores_neither_overflow_nor_lose_the_maximum(device):
    length = 200
    qkv, bias, boundaries, _ = make_inputs([length], 1, 64, device, torch.float32, length)
    qkv[:, :2] *= 4  # scores of some tens
    # The maximum of a row comes late: each tile of keys raises it.
    bias = torch.linspace(-100, 100, 2 * length - 1, device=device)[None]
    check_against_reference(
        lambda a, b: attention(a, boundaries, b, length),
        lambda a, b: reference.attention(a, b, [length], length)[0],
        [qkv, bias],
        torch.float32,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_bias_of_minus_infinity_masks(device):
    length, window = 200, 20  # most tiles of most rows are masked whole
    qkv, bias, boundaries, _ = make_inputs([length], 1, 16, device, torch.float32, length)
    bias[:, : length - 1 - window] = -torch.inf
    bias[:, length + window :] = -torch.inf
    check_against_reference(
        lambda a, b: attention(a, boundaries, b, length),
        lambda a, b: reference.attention(a, b, [length], length)[0],
        [qkv, bias],
        torch.float32,
    )


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_a_single_token_sees_itself(device, dtype):
    qkv, bias, boundaries, _ = make_inputs([1], 2, 16, device, dtype, 4)
    out = attention(qkv, boundaries, bias, 4)
    if device == "cuda" and dtype == torch.float32:  # two TF32 numbers hold a little less
        torch.testing.assert_close(out, qkv[:, 2], rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(out, qkv[:, 2])


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_nan_stays_in_its_row(device, dtype):
    qkv, bias, boundaries, _ = make_inputs([70, 70], 1, 16, device, dtype, 70)
    qkv[3, 0] = torch.nan  # a query
    out = attention(qkv, boundaries, bias, 70)
    broken = torch.isnan(out).flatten(1).any(1)
    assert broken[3] and broken.sum() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_does_not_depend_on_its_neighbours(device):
    lengths = [40, 90, 7]
    qkv, bias, boundaries, _ = make_inputs(lengths, 2, 32, device, torch.bfloat16, 100)
    packed = attention(qkv, boundaries, bias, 100)
    for part, rows in zip(qkv.split(lengths), packed.split(lengths), strict=True):
        alone = torch.tensor([0, len(part)], dtype=torch.int32, device=device)
        assert torch.equal(attention(part, alone, bias, 100), rows)


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_drops_its_share_and_all_or_nothing_at_the_ends(device):
    length, p = 512, 0.25
    qkv = torch.zeros(length, 3, 4, 8, device=device)
    qkv[:, 2] = 1  # every probability is 1 / length, so out counts those kept
    boundaries = torch.tensor([0, length], dtype=torch.int32, device=device)
    seed = torch.tensor([1], device=device)
    out = attention(qkv, boundaries, None, length, seed=seed, p=p)
    deviation = math.sqrt(p / (1 - p) / (length * length * 4))
    assert abs(float(out[..., 0].double().mean()) - 1) < 5 * deviation
    other = attention(qkv, boundaries, None, length, seed=seed, p=p, draw=1)
    assert not torch.equal(out, other)
    assert torch.equal(
        attention(qkv, boundaries, None, length, seed=seed, p=1.0), torch.zeros_like(out)
    )
    tiny = attention(qkv, boundaries, None, length, seed=seed, p=2.0**-18)
    assert torch.equal(tiny, attention(qkv, boundaries, None, length))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sequences", [0, 3])
def test_empty(device, sequences):
    qkv = torch.empty(0, 3, 2, 16, device=device, requires_grad=True)
    bias = torch.zeros(2, 7, device=device, requires_grad=True)
    boundaries = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
    out = attention(qkv, boundaries, bias, 4)
    out.sum().backward()
    assert out.shape == (0, 2, 16) and qkv.grad.shape == qkv.shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_input(device):
    qkv, bias, boundaries, seed = make_inputs([9, 30], 2, 16, device, torch.float32, 32)
    strided = [
        qkv.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(),
        bias.t().contiguous().t().requires_grad_(),
    ]
    dense = [qkv.requires_grad_(), bias.requires_grad_()]
    results = []
    for a, b in (strided, dense):
        out = attention(a, boundaries, b, 32, seed=seed, p=0.1)
        # The gradient of a sum is an expanded scalar: not contiguous either.
        results.append([out, *torch.autograd.grad(out.sum(), (a, b))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_finite_differences():
    qkv, bias, boundaries, seed = make_inputs([3, 8], 2, 8, "cpu", torch.float32, 9)

    def loss(qkv, bias):
        return attention(qkv, boundaries, bias, 9, seed=seed, p=0.2).sin().sum()

    check_finite_differences(lambda t: loss(t, bias), qkv)
    check_finite_differences(lambda t: loss(qkv, t), bias)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_bitwise_repeat(device, dtype):
    lengths = [100, 3, 65, 0, 128, 17]
    qkv, bias, boundaries, seed = make_inputs(lengths, 3, 32, device, dtype, 128)
    grad = torch.randn(sum(lengths), 3, 32, device=device).to(dtype)
    options = (boundaries, bias, 128, seed, 0.1, 0)

    def run():
        out, lse = torch.ops.metro.attention(qkv, *options)
        return [out, lse, *torch.ops.metro.attention_backward(grad, qkv, out, lse, *options)]

    assert_bitwise_repeatable(run)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_views_off_the_16_byte_boundaries(device, dtype):
    qkv, bias, boundaries, _ = make_inputs([70, 3], 2, 32, device, dtype, 70)
    grad = torch.randn(73, 2, 32, device=device).to(dtype)

    def shifted(t):
        view = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].view(t.shape).copy_(t)
        assert view.is_contiguous() and view.data_ptr() % 16
        return view

    options = (boundaries, bias, 70, None, 0.0, 0)
    out, lse = torch.ops.metro.attention(qkv, *options)
    grads = torch.ops.metro.attention_backward(grad, qkv, out, lse, *options)
    again = torch.ops.metro.attention(shifted(qkv), *options)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    given = (shifted(grad), shifted(qkv), shifted(out), lse, *options)
    for a, b in zip(torch.ops.metro.attention_backward(*given), grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_cuda_agrees_with_cpu(p, dtype):
    lengths, results = [130, 0, 5, 64, 300], []
    for device in ("cpu", "cuda"):
        qkv, bias, boundaries, seed = make_inputs(lengths, 3, 64, device, dtype, 310)
        inputs = (qkv.requires_grad_(), bias.requires_grad_())
        out = attention(qkv, boundaries, bias, 310, seed=seed, p=p)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert_close(on_cuda, on_cpu, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_drops_what_the_cpu_drops():
    kept = []
    for device in ("cpu", "cuda"):
        qkv, bias, boundaries, seed = make_inputs([3, 128], 2, 128, device, torch.float32, 128)
        qkv[3:, 2] = torch.eye(128, device=device)[:, None]  # out shows every probability
        kept.append(attention(qkv, boundaries, bias, 128, seed=seed, p=0.5)[3:].cpu() != 0)
    assert torch.equal(*kept)


@pytest.mark.parametrize("with_bias, p", [(True, 0.0), (False, 0.1)])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_opcheck(device, dtype, with_bias, p):
    qkv, bias, boundaries, seed = make_inputs([4, 9], 2, 8, device, dtype, 9, with_bias)
    options = (boundaries, bias, 9, seed if p else None, p, 3)
    out, lse = torch.ops.metro.attention(qkv, *options)
    torch.library.opcheck(
        torch.ops.metro.attention_backward, (torch.randn_like(out), qkv, out, lse, *options)
    )
    if with_bias:
        bias.requires_grad_()
    torch.library.opcheck(torch.ops.metro.attention, (qkv.requires_grad_(), *options))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    qkv, _, boundaries, seed = make_inputs([4, 9], 2, 8, device, torch.float32, 9)
    table = torch.randn(8, 2, device=device, requires_grad=True)
    qkv.requires_grad_()

    def loss(qkv, table):
        bias = relative_bias(table, 9, 16)
        return attention(qkv * 2, boundaries, bias, 9, seed=seed, p=0.1).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(qkv, table), (qkv, table))
    actual = torch.autograd.grad(compiled(qkv, table), (qkv, table))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def call(**changes):
    """attention on a good call of two sequences, with some arguments replaced."""
    arguments = {
        "qkv": torch.zeros(5, 3, 2, 8),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
        "bias": torch.zeros(2, 7),
        "max_seqlen": 4,
    }
    return attention(**(arguments | changes))


def boundaries(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qkv": torch.zeros(5, 2, 2, 8)}, r"qkv must have shape \[\*, 3, \*, \*\], found"),
        ({"qkv": torch.zeros(5, 3, 2, 8).double()}, "float32 or bfloat16, found float64"),
        ({"qkv": torch.zeros(5, 3, 2, 12)}, "head dimension must be a multiple of 8 up to 128"),
        ({"qkv": torch.zeros(5, 3, 2, 136)}, "head dimension .* found 136"),
        ({"bias": torch.zeros(2, 8)}, r"bias must have shape \[2, 7\], found \[2, 8\]"),
        ({"bias": torch.zeros(2, 7).bfloat16()}, "bias must be float32, found bfloat16"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "cu_seqlens must be int32, found int64"),
        ({"cu_seqlens": boundaries()}, r"cu_seqlens must have shape \[sequences \+ 1\], found"),
        ({"cu_seqlens": boundaries(1, 5)}, "cu_seqlens must begin with 0, found 1"),
        ({"cu_seqlens": boundaries(0, 3, 2, 5)}, "must not decrease, found 3 then 2 at index 1"),
        ({"cu_seqlens": boundaries(0, 5)}, "sequence 0 has 5 tokens, more than max_seqlen = 4"),
        ({"cu_seqlens": boundaries(0, 2, 4)}, "must end with the 5 tokens of qkv, found 4"),
        ({"cu_seqlens": boundaries(0, 4, 8)}, "must end with the 5 tokens of qkv, found 8"),
        ({"max_seqlen": 0, "bias": None}, "max_seqlen must be between 1 and .*, found 0"),
        ({"p": 0.1}, "dropout needs a seed, found None with p = 0.1"),
        ({"p": 1.5}, "p must be between 0 and 1, found 1.5"),
        ({"p": math.nan}, "p must be between 0 and 1, found nan"),
        ({"p": 0.1, "seed": torch.zeros(1)}, "seed must be int64, found float32"),
        ({"p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)}, "seed must hold one int64"),
        ({"draw": 1 << 24}, "draw must be between 0 and 2\\^24 - 1, found 16777216"),
        ({"draw": -1}, "draw must be between"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(RuntimeError, match=message):
        call(**changes)


def test_bad_arguments_of_backward():
    qkv, bias = torch.zeros(5, 3, 2, 8), torch.zeros(2, 7)
    options = (boundaries(0, 2, 5), bias, 4, None, 0.0, 0)
    out, lse = torch.ops.metro.attention(qkv, *options)
    backward = torch.ops.metro.attention_backward
    with pytest.raises(RuntimeError, match=r"grad_out must have shape \[5, 2, 8\], found \[4"):
        backward(out[:4], qkv, out, lse, *options)
    with pytest.raises(RuntimeError, match="out must be float32, found bfloat16"):
        backward(out, qkv, out.bfloat16(), lse, *options)
    with pytest.raises(RuntimeError, match=r"lse must have shape \[2, 5\], found \[5, 2\]"):
        backward(out, qkv, out, lse.t(), *options)


# ---- Buckets of relative positions ----


def bucket_by_loop(relative, buckets, max_distance):
    """T5's bucket of one key position relative to the query, with plain float32 numbers."""
    half = buckets // 2
    first = half if relative > 0 else 0
    distance, max_exact = abs(relative), half // 2
    if distance < max_exact:
        return first + distance
    growth = np.log(np.float32(distance / max_exact), dtype=np.float32)
    growth = np.float32(growth / np.float32(math.log(max_distance / max_exact)))
    return first + min(half - 1, max_exact + int(growth * np.float32(half - max_exact)))


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (4, 2), (6, 10), (64, 256)])
def test_relative_bias_against_loop(buckets, max_distance):
    length = 300
    table = torch.arange(buckets).float()[:, None] + torch.tensor([0.0, 1000.0])
    bias = relative_bias(table, length, max_distance)
    expected = torch.tensor(
        [bucket_by_loop(r, buckets, max_distance) for r in range(1 - length, length)]
    ).float()
    assert bias.shape == (2, 2 * length - 1)
    assert torch.equal(bias, torch.stack([expected, expected + 1000]))


@pytest.mark.parametrize("device", DEVICES)
def test_relative_bias_known_buckets(device):
    # MPNet: 32 buckets, 128 positions; keys before the query use buckets 0-15, keys after 16-31.
    bias = relative_bias(torch.arange(32.0, device=device)[:, None], 513, 128)[0]
    at = {0: 0, -1: 1, 1: 17, -7: 7, 7: 23, -8: 8, 8: 24, -16: 10, 16: 26, -127: 15, 512: 31}
    assert {r: int(bias[r + 512]) for r in at} == at


def test_relative_bias_symmetry_and_gradient():
    table = torch.randn(32, 3, requires_grad=True)
    bias = relative_bias(table, 200, 128)
    mirrored = relative_bias(table.roll(16, 0), 200, 128)  # swaps before and after
    assert torch.equal(mirrored.flip(1)[:, :199], bias[:, :199])
    assert torch.equal(bias[:, 199], table[0])
    bias.sum().backward()
    assert float(table.grad[:, 0].sum()) == 399
    assert torch.equal(table.grad[1:8], torch.ones(7, 3))
    assert torch.equal(table.grad[16], torch.zeros(3))  # distance 0 lies in the first half


@pytest.mark.parametrize(
    "shape, length, distance, message",
    [
        ((31, 2), 5, 128, "even number of buckets, at least 4, found \\[31, 2\\]"),
        ((32,), 5, 128, "table must have shape"),
        ((32, 2), 0, 128, "max_seqlen must be at least 1, found 0"),
        ((32, 2), 5, 8, "max_distance must be more than .* \\(8\\), found 8"),
    ],
)
def test_relative_bias_bad_arguments(shape, length, distance, message):
    with pytest.raises(UserError, match=message):
        relative_bias(torch.zeros(shape), length, distance)
