import sys

import pytest
import reference
import torch
from op_checks import DEVICE_DTYPES, DEVICES, check_against_reference

from metro_ext.ops import bias_gelu_linear, linear, normed


def tensors(device, dtype, *shapes):
    """The first in dtype, the others, parameters, in float32."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return [made[0].to(dtype), *made[1:]]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_linear_matches_reference(device, dtype, with_bias):
    shapes = [(37, 12), (9, 12)] + ([(9,)] if with_bias else [])
    inputs = tensors(device, dtype, *shapes)
    check_against_reference(linear, torch.nn.functional.linear, inputs, dtype)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_bias_gelu_linear_matches_reference(device, dtype):
    def expected(x, bias, weight):
        return reference.bias_gelu(x, bias) @ weight.t()

    inputs = tensors(device, dtype, (37, 24), (24,), (10, 24))
    check_against_reference(bias_gelu_linear, expected, inputs, dtype)


@pytest.mark.parametrize("widens", [False, True])
def test_bfloat16_products_on_any_cpu(monkeypatch, widens):
    """A sum of 600 exact products, rounded once: within half a unit of the last place."""
    module = sys.modules[linear.__module__]
    monkeypatch.setattr(module, "WIDENS_BFLOAT16", widens)
    x, weight, bias = tensors("cpu", torch.bfloat16, (5, 600), (7, 600), (7,))
    weight, bias = weight.bfloat16().float(), bias.bfloat16().float()
    out = linear(x, weight, bias)
    expected = x.double() @ weight.double().t() + bias.double()
    assert out.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, and what float32 sums lose on 600 terms of size one.
    assert ((out.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-4).all()


@pytest.mark.parametrize("device", DEVICES)
def test_keeps_neither_copies_of_weights_nor_the_gelu(device):
    x, bias, weight = tensors(device, torch.bfloat16, (64, 24), (24,), (10, 24))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bias_gelu_linear(x.requires_grad_(), bias.requires_grad_(), weight.requires_grad_())
        linear(x, weight, None)
    pointers = {t.data_ptr() for t in kept}
    assert pointers == {x.data_ptr(), bias.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    x, bias, weight = tensors(device, torch.float32, (8, 24), (24,), (10, 24))
    inputs = [t.requires_grad_() for t in (x, bias, weight)]

    def function(x, bias, weight):
        return linear(bias_gelu_linear(x, bias, weight), weight.t()).sum()

    compiled = torch.compile(function, fullgraph=True)
    expected = torch.autograd.grad(function(*inputs), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device, dtype", DEVICE_DTYPES)
def test_a_norm_computed_again_gives_the_same_bits(device, dtype):
    x, weight, shift, matrix, bias = tensors(device, dtype, (37, 24), (24,), (24,), (9, 24), (9,))
    inputs = [t.requires_grad_() for t in (x, weight, shift, matrix, bias)]
    residual = x.detach().flip(0)

    def gradients(recompute):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            norm = normed(x, weight, shift, residual=residual)
            out = linear(norm if recompute else norm.out, matrix, bias)
        is_kept = norm.out.data_ptr() in {t.data_ptr() for t in kept}
        assert is_kept == (not recompute)
        return torch.autograd.grad((out * out.detach().sin()).sum() + norm.out.sum(), inputs)

    for again, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(again, expected)
