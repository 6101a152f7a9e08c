"""The CUDA kernels of bias_gelu, emulated, against the float64 reference."""

import pytest
import reference
import torch
from emulation import DTYPES, emulated
from op_checks import assert_close


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (0, 8), (70, 257), (65, 768)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, shape, order):
    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(cols, generator=generator)
    call = {"x": x, "bias": bias, "rows": rows, "cols": cols, "dtype": dtype, "order": order}
    kernels = emulated("gelu")
    out = kernels.run("bias_gelu", **call, out=x, written=("out",))["out"]
    got = kernels.run(
        "bias_gelu_backward",
        **call,
        grad_out=grad,
        grad_x=x,
        grad_bias=bias,
        partials=torch.empty(64, cols),
        written=("grad_x", "grad_bias", "partials"),
    )
    leaves = [t.double().requires_grad_() for t in (x, bias)]
    expected = reference.bias_gelu(*leaves)
    expected.backward(grad.double())
    assert_close(out, expected, dtype, "output")
    assert_close(got["grad_x"], leaves[0].grad, dtype, "grad_x")
    assert_close(got["grad_bias"], leaves[1].grad, torch.float32, "grad_bias")
