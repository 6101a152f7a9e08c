import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import reference
import torch
from op_checks import (
    DEVICE_DTYPES,
    assert_bitwise_repeatable,
    assert_close,
    check_against_reference,
    check_finite_differences,
)
from vocab_head_inputs import key, make_inputs

from metro_ext.ops import HeadGradients, vocab_head, vocab_head_loss

# N, H, V: below a sample tile, on its border, beyond; panels, blocks of depth and blocks of tiles
# that are full, nearly so, and more than one of; more than one chunk of rows.
SHAPES = [
    (1, 1, 1), (3, 5, 7), (7, 16, 256), (33, 24, 257), (5, 8, 1031), (11, 32, 4609),
    (67, 270, 321), (200, 65, 2500), (1100, 9, 300),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_matches_reference(device, dtype, shape):
    inputs = [t.to(device) for t in make_inputs(*shape, dtype)]
    if shape[0] > 2:
        inputs[-1][1] = -100
    check_against_reference(
        lambda *args: vocab_head_loss(*args, scale=0.3)[0],
        lambda *args: 0.3 * reference.vocab_head(*args).sum(),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_lse_and_hit_match_reference(device, dtype, shape):
    hidden, weight, bias, target = make_inputs(*shape, dtype)
    logits = reference.vocab_logits(hidden.double(), weight.double(), bias.double())
    target[::2] = logits.argmax(1)[::2]
    out = vocab_head(*(t.to(device) for t in (hidden, weight, bias, target)))
    expected = reference.vocab_head(hidden.double(), weight.double(), bias.double(), target)
    assert_close(out.nll, expected, dtype, "nll")
    assert_close(out.lse, logits.logsumexp(1), dtype, "lse")
    best, second = logits.topk(min(2, shape[2]), 1).values.T[[0, -1]]
    clear = (best - second > 0.05) | (second == best)  # rounding may swap the others
    assert clear.any()
    assert torch.equal(out.hit.cpu().bool()[clear], (logits.argmax(1) == target)[clear])
    assert out.sample.numel() == 0


def test_hit_takes_the_first_index_at_ties():
    hidden, weight = torch.zeros(3, 4), torch.zeros(1000, 4)
    bias = torch.zeros(1000)
    bias[[300, 301, 900]] = 1.0
    assert vocab_head(hidden, weight, bias, torch.tensor([300, 301, 900])).hit.tolist() == [1, 0, 0]


def test_large_logits_do_not_overflow():
    hidden, weight, bias, target = make_inputs(9, 8, 700, scale=1000.0)
    out = vocab_head(hidden, weight, bias, target, key(1))
    expected = reference.vocab_head(hidden.double(), weight.double(), bias.double(), target)
    assert_close(out.nll, expected, torch.float32)


def test_forbidden_and_broken_logits():
    """A bias of -inf forbids a token; NaN anywhere in the logits reaches the loss."""
    hidden, weight, bias, target = make_inputs(6, 8, 1000)
    bias[:600] = -torch.inf
    target[:] = 700
    hidden.requires_grad_()
    loss, out = vocab_head_loss(hidden, weight, bias, target, seed=key(3))
    expected = reference.vocab_head(hidden, weight, bias, target)
    torch.testing.assert_close(out.nll, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(total, hidden)[0] for total in (loss, expected.sum()))
    )
    assert (out.sample >= 600).all()
    with torch.no_grad():
        weight[800] = torch.nan
        out = vocab_head(hidden, weight, bias, target, key(3))
    assert out.nll.isnan().all()
    assert ((out.sample >= 0) & (out.sample < 1000)).all()


def test_ignored_rows():
    hidden, weight, bias, target = make_inputs(6, 8, 300)
    target[[0, 4]] = -100
    hidden.requires_grad_()
    weight.requires_grad_()
    loss, out = vocab_head_loss(hidden, weight, bias, target, seed=key(1))
    loss.backward()
    assert (out.nll[[0, 4]] == 0).all() and (out.hit[[0, 4]] == 0).all()
    assert (hidden.grad[[0, 4]] == 0).all() and (hidden.grad[[1, 2, 3, 5]] != 0).any(1).all()
    kept = [1, 2, 3, 5]
    (grad,) = torch.autograd.grad(
        vocab_head_loss(hidden[kept], weight, bias, target[kept])[0], weight
    )
    torch.testing.assert_close(weight.grad, grad)
    target[[0, 4]] = 5
    assert torch.equal(vocab_head(hidden, weight, bias, target, key(1)).sample, out.sample)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_empty(device, dtype):
    hidden, weight, bias, target = make_inputs(0, 8, 300, dtype)
    hidden, weight, bias = leaves = [t.to(device).requires_grad_() for t in (hidden, weight, bias)]
    loss, out = vocab_head_loss(*leaves, target.to(device), seed=key(1).to(device))
    loss.backward()
    assert loss == 0 and [t.shape for t in out] == [(0,)] * 4
    assert hidden.grad.shape == (0, 8)
    assert (weight.grad == 0).all() and (bias.grad == 0).all()


def test_non_contiguous_input():
    dense = make_inputs(12, 20, 600)
    hidden, weight, bias, target = dense
    strided = (
        hidden.t().contiguous().t(),
        weight.repeat(1, 2)[:, :20],
        bias.repeat_interleave(2)[::2],
        target.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in strided)
    results = []
    for *floats, ids in (dense, strided):
        leaves = [t.detach().requires_grad_() for t in floats]
        loss, out = vocab_head_loss(*leaves, ids, seed=key(1))
        results.append([*out, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_finite_differences():
    hidden, weight, bias, target = make_inputs(4, 6, 270)
    target[2] = -100
    check_finite_differences(lambda t: vocab_head_loss(t, weight, bias, target)[0], hidden)
    check_finite_differences(lambda t: vocab_head_loss(hidden, t, bias, target)[0], weight)
    check_finite_differences(lambda t: vocab_head_loss(hidden, weight, t, target)[0], bias)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_heads_on_one_matrix_add_their_gradients(device, dtype):
    """Two heads with scales of their own, and a part of the loss that is not theirs."""
    hidden, weight, bias, target = (t.to(device) for t in make_inputs(70, 24, 600, dtype))
    other = [t.to(device) for t in make_inputs(9, 24, 600, dtype, seed=1)]
    other_hidden, other_bias, other_target = other[0], other[2], other[3]
    leaves = [t.requires_grad_() for t in (hidden, weight, bias, other_hidden, other_bias)]
    scales = [torch.tensor(value, device=device) for value in (0.5, -2.0)]
    heads = HeadGradients(weight)
    first = heads.vocab_head(hidden, bias, target, scales[0])
    second = heads.vocab_head(other_hidden, other_bias, other_target, scales[1], key(1).to(device))
    plain = weight.float().square().sum()
    loss = 3.0 * heads.attach(scales[0] * first.nll.sum() + scales[1] * second.nll.sum() + plain)
    grads = torch.autograd.grad(loss, leaves)
    given = [t.detach().cpu().double().requires_grad_() for t in leaves]
    h, w, b, other_h, other_b = given
    expected = 3.0 * (
        0.5 * reference.vocab_head(h, w, b, target.cpu()).sum()
        - 2.0 * reference.vocab_head(other_h, w, other_b, other_target.cpu()).sum()
        + w.square().sum()
    )
    assert_close(loss, expected, dtype, "loss")
    for ours, theirs in zip(grads, torch.autograd.grad(expected, given), strict=True):
        assert_close(ours, theirs, dtype, "gradient")


def test_gradients_only_where_they_are_needed():
    hidden, weight, bias, target = make_inputs(5, 12, 300)
    heads = HeadGradients(weight)
    heads.vocab_head(hidden, bias, target, torch.tensor(1.0))
    loss = torch.tensor(2.0)
    assert heads.attach(loss) is loss
    with torch.no_grad():
        loss, _ = vocab_head_loss(hidden, weight.requires_grad_(), bias, target)
    assert not loss.requires_grad
    loss, head = vocab_head_loss(hidden, weight, bias, target)
    assert loss.requires_grad and not any(t.requires_grad for t in head)
    torch.autograd.grad(3.0 * loss, weight, retain_graph=True)  # scales them in place
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_bitwise_repeat(device, dtype):
    inputs = [t.to(device) for t in make_inputs(230, 64, 5000, dtype)]
    grad_weight = torch.empty_like(inputs[1])

    def run():
        out = torch.ops.metro.vocab_head_gradients(
            *inputs, key(5).to(device), 0.9, 0, torch.tensor(0.1, device=device), grad_weight, False
        )
        return [*out, grad_weight]

    assert_bitwise_repeatable(run)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_opcheck(device, dtype):
    inputs = [t.to(device) for t in make_inputs(5, 12, 300, dtype)]
    scale, grad_weight = torch.tensor(0.5, device=device), torch.ones_like(inputs[1])
    for seed in (None, key(2).to(device)):
        arguments = (*inputs, seed, 0.7, 3)
        torch.library.opcheck(torch.ops.metro.vocab_head, arguments)
        for accumulate in (False, True):
            torch.library.opcheck(
                torch.ops.metro.vocab_head_gradients, (*arguments, scale, grad_weight, accumulate)
            )


def test_compiles_whole():
    hidden, weight, bias, target = make_inputs(6, 16, 700)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def loss(hidden, weight, bias):
        heads = HeadGradients(weight)
        scale = torch.full((), 0.5)
        first = heads.vocab_head(hidden, bias, target, scale, key(4))
        second = heads.vocab_head(2 * hidden, 2 * bias, target, scale)
        total = heads.attach(0.5 * first.nll.sum() + 0.5 * second.nll.sum())
        return total + first.hit.sum() + first.sample.sum()

    compiled = torch.compile(loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, loss(*leaves))
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- Memory and mistakes ----

MEMORY_SCRIPT = """
    import resource, sys, torch
    from metro_ext.ops import HeadGradients, vocab_head, vocab_head_loss
    rows, width, vocab = map(int, sys.argv[1:])

    def peak_mb():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def step(hidden, weight, bias, target):
        scale = 1 / target.numel()
        loss, _ = vocab_head_loss(hidden, weight, bias, target, scale, torch.tensor([1]))
        loss.backward()
        return [t.grad for t in (hidden, weight, bias)]

    def inputs(vocab):
        return (
            torch.ones(rows, width).bfloat16().requires_grad_(),
            torch.ones(vocab, width, dtype=torch.bfloat16).requires_grad_(),
            torch.ones(vocab).requires_grad_(),
            torch.zeros(rows, dtype=torch.int64),
        )

    step(*(t[:8] for t in inputs(64)))  # libraries and thread pools
    big = inputs(vocab)
    before = peak_mb()
    grads = step(*big)
    gradients = sum(g.numel() * g.element_size() for g in grads) / 2**20
    print(peak_mb() - before - gradients)
"""


@pytest.mark.parametrize("rows, vocab", [(614, 65536), (8192, 2048)])
def test_scratch_memory(rows, vocab):
    """The process's peak grows by at most 64 MB beyond inputs and gradients."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY_SCRIPT), str(rows), "768", str(vocab)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert float(result.stdout) <= 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_draws_as_the_cpu_and_in_a_graph(dtype):
    """One-hot rows make the products exact, so that both devices see the same logits."""
    _, weight, bias, target = make_inputs(33, 33, 5000, dtype, scale=10.0)
    inputs = (torch.eye(33, dtype=dtype), weight, bias, target, key(3))

    def call(device):
        given = [t.to(device) for t in inputs]
        scale, grad_weight = torch.tensor(0.5, device=device), torch.empty_like(given[1])

        def run():
            out = torch.ops.metro.vocab_head_gradients(
                *given, 0.7, 2, scale, grad_weight, accumulate=False
            )
            return [*out, grad_weight]

        return run

    expected, on_gpu = call("cpu")(), call("cuda")
    out = [t.clone() for t in on_gpu()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on_gpu()
    graph.replay()
    for ours, again, theirs in zip(out, captured, expected, strict=True):
        assert torch.equal(ours, again)
        tolerance = 1e-5 if theirs.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(out[3].cpu(), expected[3])  # the samples


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=torch.zeros(3, 4).double()), "hidden must be float32 or bfloat16, found floa"),
        (dict(hidden=torch.zeros(4)), r"hidden must have shape \[\*, \*\], found \[4\]"),
        (dict(hidden=torch.zeros(3, 0)), r"hidden must have at least one column, found \[3, 0\]"),
        (dict(weight=torch.zeros(9, 5)), r"weight must have shape \[\*, 4\], found \[9, 5\]"),
        (dict(weight=torch.zeros(9, 4).bfloat16()), "weight must be float32, found bfloat16"),
        (dict(weight=torch.zeros(0, 4), bias=torch.zeros(0)), "weight must have at least one row"),
        (dict(bias=torch.zeros(8)), r"bias must have shape \[9\], found \[8\]"),
        (dict(bias=torch.zeros(9).bfloat16()), "bias must be float32, found bfloat16"),
        (dict(target=torch.zeros(3, dtype=torch.int32)), "target must be int64, found int32"),
        (dict(target=torch.zeros(2, dtype=torch.int64)), r"target must have shape \[3\], found"),
        (dict(target=torch.tensor([0, 9, 0])), r"target must hold ids in \[0, 9\) or -100 .* 9 at"),
        (dict(target=torch.tensor([0, 0, -1])), "found -1 at row 2"),
        (dict(seed=torch.zeros(2, dtype=torch.int64)), "seed must hold one int64"),
        (dict(seed=torch.zeros(1)), "seed must be int64, found float32"),
        (dict(temperature=0.0), "temperature must be positive and finite, found 0"),
        (dict(temperature=-1.0), "temperature must be positive and finite, found -1"),
        (dict(temperature=math.nan), "temperature must be positive and finite, found nan"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(
        hidden=torch.zeros(3, 4),
        weight=torch.zeros(9, 4),
        bias=torch.zeros(9),
        target=torch.zeros(3, dtype=torch.int64),
        seed=key(1),
    )
    with pytest.raises(RuntimeError, match=f"vocab_head: .*{message}"):
        vocab_head(**{**arguments, **change})


def test_gradients_bad_arguments():
    inputs = make_inputs(3, 4, 9)

    def call(**change):
        given = dict(target=inputs[3], scale=torch.ones(1), grad_weight=torch.ones(9, 4)) | change
        torch.ops.metro.vocab_head_gradients(
            *inputs[:3], seed=None, temperature=1.0, draw=0, accumulate=False, **given
        )

    call()
    for change, message in (
        (dict(scale=torch.ones(3)), r"scale must hold one number, found shape \[3\]"),
        (dict(scale=torch.ones(1).double()), "scale must be float32, found float64"),
        (dict(grad_weight=torch.ones(9, 5)), r"grad_weight must have shape \[9, 4\]"),
        (dict(grad_weight=torch.ones(9, 4).bfloat16()), "grad_weight must be float32, found bfl"),
        (dict(grad_weight=torch.ones(4, 9).t()), "grad_weight must be contiguous"),
        (dict(target=torch.tensor([0, 1, 9])), "target must hold ids in"),
    ):
        with pytest.raises(RuntimeError, match=f"vocab_head_gradients: .*{message}"):
            call(**change)


@pytest.mark.parametrize("draw", [-1, 1 << 24, 1 << 32])
def test_a_draw_out_of_range_is_refused(draw):
    hidden, weight, target = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match=rf"vocab_head: draw must be between .* found {draw}"):
        vocab_head(hidden, weight, torch.zeros(5), target, seed=torch.tensor(0), draw=draw)
