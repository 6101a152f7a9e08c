import pytest
import reference
import torch
from op_checks import (
    DEVICE_DTYPES,
    DEVICES,
    assert_bitwise_repeatable,
    check_against_reference,
    check_finite_differences,
)

from metro_ext.ops import bias_gelu

SHAPES = [(7, 5), (1, 1), (130, 257), (3, 4, 64), (65, 768), (5, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_matches_reference(device, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    bias = torch.randn(shape[-1], generator=generator).to(device)
    check_against_reference(bias_gelu, reference.bias_gelu, [x, bias], dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_keeps_relative_precision_in_the_tail(device):
    x = torch.linspace(-9, 9, 1001, device=device)
    out = bias_gelu(x[:, None], torch.zeros(1, device=device))[:, 0]
    z = x.double().cpu()
    expected = z * 0.5 * torch.erfc(-z / 2**0.5)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_values(device):
    x = torch.tensor([[-1e30, 1e30, -torch.inf, torch.inf, torch.nan, 0.0]], device=device)
    out = bias_gelu(x, torch.zeros(6, device=device))[0]
    assert out[0] == 0 and out[1] == 1e30 and out[3] == torch.inf and out[5] == 0
    assert torch.isnan(out[4])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,)])
def test_empty(device, shape):
    x = torch.empty(shape, device=device, requires_grad=True)
    bias = torch.zeros(shape[-1], device=device, requires_grad=True)
    out = bias_gelu(x, bias)
    out.sum().backward()
    assert out.shape == x.shape and x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_input(device):
    x = torch.randn(16, 9, device=device).t()
    bias = torch.randn(32, device=device)[::2]
    torch.testing.assert_close(bias_gelu(x, bias), bias_gelu(x.contiguous(), bias.contiguous()))


def test_finite_differences():
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(6, 5, generator=generator), torch.randn(5, generator=generator)
    check_finite_differences(lambda t: bias_gelu(t, bias).sin().sum(), x)
    check_finite_differences(lambda t: bias_gelu(x, t).sin().sum(), bias)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_bitwise_repeat(device, dtype):
    x, grad = torch.randn(2, 999, 130, device=device).to(dtype)
    bias = torch.randn(130, device=device)
    assert_bitwise_repeatable(
        lambda: [bias_gelu(x, bias), *torch.ops.metro.bias_gelu_backward(grad, x, bias)]
    )


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_opcheck(device, dtype):
    x = torch.randn(5, 12, device=device).to(dtype).requires_grad_()
    bias = torch.randn(12, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.metro.bias_gelu, (x, bias))
    arguments = (torch.randn_like(x), x.detach(), bias.detach())
    torch.library.opcheck(torch.ops.metro.bias_gelu_backward, arguments)
    torch.library.opcheck(torch.ops.metro.bias_gelu_backward_, arguments)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (70, 130), (9, 256)])
def test_backward_in_place(device, dtype, shape):
    x, grad = torch.randn(2, *shape, device=device).to(dtype)
    bias = torch.randn(shape[-1], device=device)
    expected, expected_bias = torch.ops.metro.bias_gelu_backward(grad, x, bias)
    grad_bias = torch.ops.metro.bias_gelu_backward_(grad, x, bias)
    assert torch.equal(grad, expected) and torch.equal(grad_bias, expected_bias)
    with pytest.raises(RuntimeError, match="bias_gelu_backward_: grad_out must be contiguous"):
        torch.ops.metro.bias_gelu_backward_(
            torch.zeros(4, 3).t(), torch.zeros(3, 4), torch.zeros(4)
        )


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    x = torch.randn(6, 16, device=device, requires_grad=True)
    bias = torch.randn(16, device=device, requires_grad=True)
    compiled = torch.compile(lambda a, b: bias_gelu(a * 2, b).sum(), fullgraph=True)
    expected = torch.autograd.grad(bias_gelu(x * 2, bias).sum(), (x, bias))
    for a, b in zip(torch.autograd.grad(compiled(x, bias), (x, bias)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "x, bias, message",
    [
        (torch.zeros(3, 4), torch.zeros(5), r"bias_gelu: bias must have shape \[4\], found \[5\]"),
        (
            torch.zeros(3, 4).double(),
            torch.zeros(4),
            "x must be float32 or bfloat16, found float64",
        ),
        (torch.zeros(3, 4), torch.zeros(4).bfloat16(), "bias must be float32, found bfloat16"),
        (torch.zeros(()), torch.zeros(1), "x must have at least one dimension"),
    ],
)
def test_bad_arguments(x, bias, message):
    with pytest.raises(RuntimeError, match=message):
        bias_gelu(x, bias)
