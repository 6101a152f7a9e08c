import pytest
import reference
import torch
from op_checks import (
    DEVICE_DTYPES,
    DEVICES,
    TOLERANCE,
    assert_bitwise_repeatable,
    check_against_reference,
    check_finite_differences,
    relative_error,
)
from philox_reference import hidden_dropout_factor

from metro_ext.ops import layer_norm

SEED = 0x1234_5678_9ABC_DEF1
SHAPES = [(7, 5), (130, 257), (3, 4, 64), (65, 768), (9, 136), (70, 24), (2, 1000)]


def make_seed(device="cpu", value=SEED):
    return torch.tensor([value], device=device)


def make_inputs(shape, device, dtype):
    """x, weight, shift, bias, residual."""
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *shape, generator=generator).to(device, dtype)
    weight, shift, bias = torch.randn(3, shape[-1], generator=generator).to(device)
    return [x, weight + 1, shift, bias, residual + 0.5]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_matches_reference(device, dtype, shape, p):
    factor = hidden_dropout_factor(SEED, p, 3, shape)
    check_against_reference(
        lambda x, weight, shift, bias, residual: layer_norm(
            x, weight, shift, bias=bias, residual=residual, seed=make_seed(device), p=p, draw=3
        ),
        lambda *inputs: reference.layer_norm(*inputs, factor),
        make_inputs(shape, device, dtype),
        dtype,
    )


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("with_bias, with_residual", [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_without_bias_or_residual(device, dtype, with_bias, with_residual, p):
    shape = (33, 50)
    x, weight, shift, bias, residual = make_inputs(shape, device, dtype)
    optional = {}
    if with_bias:
        optional["bias"] = bias
    if with_residual:
        optional["residual"] = residual
    factor = hidden_dropout_factor(SEED, p, 0, shape)
    check_against_reference(
        lambda *t: layer_norm(
            *t[:3], **dict(zip(optional, t[3:], strict=True)), seed=make_seed(device), p=p
        ),
        lambda *t: reference.layer_norm(
            *t[:3], **dict(zip(optional, t[3:], strict=True)), dropout_factor=factor
        ),
        [x, weight, shift, *optional.values()],
        dtype,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cols", [1, 5, 8, 13, 128, 200, 771])
def test_dropout_mask_is_philox(device, cols):
    """The mask, read off the sum, is that of the reference; element by element."""
    for p, draw, seed in [(0.1, 0, 0), (0.3, 2**24 - 1, -1), (0.9, 7, SEED)]:
        x = torch.ones(37, cols, device=device)
        ones = torch.ones(cols, device=device)
        arguments = (None, None, ones, ones, make_seed(device, seed), p, draw, 1e-5)
        total = torch.ops.metro.layer_norm(x, *arguments)[1]
        factor = hidden_dropout_factor(seed, p, draw, (37, cols))
        assert torch.equal(total.cpu(), factor.float())


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_share(device):
    x = torch.ones(1000, 200, device=device)
    ones = torch.ones(200, device=device)
    for p in (0.1, 0.5):
        total = torch.ops.metro.layer_norm(
            x, None, None, ones, ones, make_seed(device), p, 0, 1e-5
        )[1]
        dropped = float((total == 0).double().mean())
        assert abs(dropped - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
        assert abs(float(total.double().mean()) - 1) < 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_dropping_everything_leaves_the_residual(device):
    x, weight, shift, bias, residual = make_inputs((6, 40), device, torch.float32)
    x.requires_grad_()
    out = layer_norm(x, weight, shift, bias=bias, residual=residual, seed=make_seed(device), p=1.0)
    torch.testing.assert_close(out, layer_norm(residual, weight, shift))
    out.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_large_mean_loses_no_precision(device):
    """The variance of the centred values: a one-pass formula fails here altogether."""
    generator = torch.Generator().manual_seed(2)
    x = (4096 + torch.randn(8, 768, generator=generator)).to(device)
    ones = torch.ones(768, device=device)
    expected = reference.layer_norm(x.double().cpu(), torch.ones(768), torch.zeros(768))
    out = layer_norm(x, ones, torch.zeros_like(ones))
    # Near 4096 a float32 mean is a multiple of 2^-11: off by at most 2.4e-4 standard deviations.
    assert relative_error(out, expected) < 2.6e-4


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_values(device):
    ones, zeros = torch.ones(4, device=device), torch.zeros(4, device=device)
    x = torch.tensor([[3.0, 3.0, 3.0, 3.0], [1.0, torch.nan, 0.0, 0.0]], device=device)
    out = layer_norm(x, ones, ones)
    assert torch.equal(out[0], ones)  # no variance: the shift alone
    assert torch.isnan(out[1]).all()
    constant = torch.full((1, 769), 1.23e8, device=device)
    assert torch.isfinite(layer_norm(constant, constant[0], constant[0])).all()
    assert torch.isnan(layer_norm(torch.full((1, 4), torch.inf, device=device), ones, zeros)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,), (2, 0, 3)])
def test_empty(device, shape, p):
    x = torch.empty(shape, device=device, requires_grad=True)
    residual = torch.empty(shape, device=device, requires_grad=True)
    weight, shift, bias = torch.zeros(3, shape[-1], device=device).requires_grad_().unbind()
    leaves = (x, residual, weight, shift, bias)
    out = layer_norm(x, weight, shift, bias=bias, residual=residual, seed=make_seed(device), p=p)
    assert out.shape == x.shape
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_input(device):
    x, residual = torch.randn(2, 16, 9, device=device).transpose(1, 2).unbind()
    weight, shift, bias = torch.randn(3, 32, device=device)[:, ::2].unbind()
    options = {"seed": make_seed(device), "p": 0.2}
    actual = layer_norm(x, weight, shift, bias=bias, residual=residual, **options)
    expected = layer_norm(
        x.contiguous(),
        weight.contiguous(),
        shift.contiguous(),
        bias=bias.contiguous(),
        residual=residual.contiguous(),
        **options,
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_finite_differences(p):
    inputs = make_inputs((6, 20), "cpu", torch.float32)
    probe = torch.randn(6, 20, generator=torch.Generator().manual_seed(4))

    def loss(*t):
        out = layer_norm(*t[:3], bias=t[3], residual=t[4], seed=make_seed(), p=p)
        return (out * probe).sin().sum()

    for i in range(5):
        check_finite_differences(lambda t, i=i: loss(*inputs[:i], t, *inputs[i + 1 :]), inputs[i])


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_bitwise_repeat(device, dtype, p):
    x, weight, shift, bias, residual = make_inputs((999, 130), device, dtype)
    seed = make_seed(device)

    def forward_and_backward():
        out = torch.ops.metro.layer_norm(x, bias, residual, weight, shift, seed, p, 1, 1e-5)
        grads = torch.ops.metro.layer_norm_backward(residual, *out[1:], weight, seed, p, 1)
        return [*out, *grads]

    assert_bitwise_repeatable(forward_and_backward)


@pytest.mark.parametrize("device", DEVICES)
def test_seed_and_draw_matter(device):
    x, weight, shift, _, _ = make_inputs((4, 64), device, torch.float32)

    def run(seed, draw):
        return layer_norm(x, weight, shift, seed=make_seed(device, seed), p=0.5, draw=draw)

    assert torch.equal(run(1, 0), run(1, 0))
    assert not torch.equal(run(1, 0), run(2, 0))
    assert not torch.equal(run(1, 0), run(1, 1))
    assert not torch.equal(run(1, 0), run(1 + 2**32, 0))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_opcheck(device, dtype, optional, p):
    x, weight, shift, bias, residual = (
        t.requires_grad_() for t in make_inputs((5, 12), device, dtype)
    )
    if not optional:
        bias = residual = None
    seed = make_seed(device) if p else None
    arguments = (x, bias, residual, weight, shift, seed, p, 1, 1e-5)
    torch.library.opcheck(torch.ops.metro.layer_norm, arguments)
    _, total, mean, rstd = torch.ops.metro.layer_norm(*arguments)
    grad = torch.randn_like(x).detach()
    arguments = (grad, total.detach(), mean, rstd, weight.detach(), seed, p, 1)
    torch.library.opcheck(torch.ops.metro.layer_norm_backward, arguments)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device, p):
    inputs = [t.requires_grad_() for t in make_inputs((6, 16), device, torch.float32)]

    def loss(x, weight, shift, bias, residual, seed):
        out = layer_norm(x * 2, weight, shift, bias=bias, residual=residual, seed=seed, p=p)
        return out.square().sum()

    seed = make_seed(device)
    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(*inputs, seed), inputs)
    actual = torch.autograd.grad(compiled(*inputs, seed), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_torch(dtype):
    x, weight, shift, _, _ = make_inputs((40, 96), "cpu", dtype)
    expected = torch.nn.functional.layer_norm(x.float(), (96,), weight, shift)
    assert relative_error(layer_norm(x, weight, shift), expected) < TOLERANCE[dtype]


X, V = torch.zeros(3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer_norm(X, torch.zeros(5), V), r"layer_norm: weight must have shape \[4\]"),
        (lambda: layer_norm(X, V, torch.zeros(4, 1)), r"shift must have shape \[4\], found"),
        (lambda: layer_norm(X.double(), V, V), "x must be float32 or bfloat16, found float64"),
        (lambda: layer_norm(X, V.double(), V), "weight must be float32, found float64"),
        (lambda: layer_norm(X, V, V, bias=V.bfloat16()), "bias must be float32, found bfloat16"),
        (lambda: layer_norm(X, V, V, residual=X.bfloat16()), "residual must be float32"),
        (
            lambda: layer_norm(X, V, V, residual=X[:2]),
            r"residual must have the shape of x \[3, 4\]",
        ),
        (lambda: layer_norm(X.sum(), V, V), "x must have at least one dimension"),
        (lambda: layer_norm(X, V, V, p=0.1), r"p = 0.1 needs a seed \(one int64\), found None"),
        (lambda: layer_norm(X, V, V, p=1.5, seed=make_seed()), r"p must lie in \[0, 1\]"),
        (lambda: layer_norm(X, V, V, p=0.1, seed=V), "seed must be int64, found float32"),
        (
            lambda: layer_norm(X, V, V, p=0.1, seed=make_seed().repeat(2)),
            r"seed must hold one int64, found shape \[2\]",
        ),
        (lambda: layer_norm(X, V, V, draw=2**24), r"draw must lie in \[0, 2\^24\)"),
        (lambda: layer_norm(X, V, V, eps=-1.0), "eps must not be negative, found -1"),
        (
            lambda: torch.ops.metro.layer_norm_backward(X, X, V[:3], V, V, None, 0.0, 0),
            r"layer_norm_backward: rstd must have shape \[3\]",
        ),
        (
            lambda: torch.ops.metro.layer_norm_backward(X[:2], X, V[:3], V[:3], V, None, 0.0, 0),
            r"grad_out must have the shape of sum \[3, 4\], found \[2, 4\]",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
def test_devices_may_not_be_mixed():
    with pytest.raises(RuntimeError, match="weight must be on the device of"):
        layer_norm(X.cuda(), V, V.cuda())
