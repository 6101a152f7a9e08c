"""The CUDA kernels of layer_norm, emulated, against the float64 reference."""

import pytest
import reference
import torch
from emulation import DTYPES, emulated
from op_checks import assert_close
from philox_reference import hidden_dropout_factor

SEED = 0x1234_5678_9ABC_DEF1


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(9, 5), (0, 8), (19, 64), (11, 520), (67, 768), (3, 4104)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, shape, p):
    generator = torch.Generator().manual_seed(0)
    rows, cols = shape
    x, residual, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight, shift, bias = torch.randn(3, cols, generator=generator).unbind()
    seed = torch.tensor([SEED]) if p else None
    row = torch.empty(rows)
    call = {"rows": rows, "cols": cols, "dtype": dtype, "p": p, "draw": 3, "seed": seed}
    kernels = emulated("layer_norm")
    inputs = {"x": x, "bias": bias, "residual": residual, "weight": weight, "shift": shift}
    got = kernels.run("layer_norm", **call, **inputs, eps=1e-5, out=x, sum=x, mean=row, rstd=row,
                      written=("out", "sum", "mean", "rstd"))  # fmt: skip
    outputs = {"grad_x": x, "grad_residual": x if p else None, "grad_bias": bias,
               "grad_weight": bias, "grad_shift": bias,
               "partials": torch.empty((rows + 7) // 8, 3, cols)}  # fmt: skip
    saved = {name: got[name] for name in ("sum", "mean", "rstd")}
    grads = [
        kernels.run("layer_norm_backward", **call, **saved, **outputs, grad_out=grad,
                    weight=weight, order=order, written=tuple(outputs))
        for order in ("forward", "reverse")
    ]  # fmt: skip
    factor = hidden_dropout_factor(SEED, p, 3, shape)
    names = ("x", "weight", "shift", "bias", "residual")
    leaves = [inputs[name].double().requires_grad_() for name in names]
    expected = reference.layer_norm(*leaves, factor)
    expected.backward(grad.double())
    assert_close(got["out"], expected, dtype, "out")
    grads[0]["grad_residual"] = grads[0].get("grad_residual", grads[0]["grad_x"])
    for name, leaf in zip(names, leaves, strict=True):
        assert_close(grads[0][f"grad_{name}"], leaf.grad, dtype, name)
    assert all(torch.equal(t, grads[0][name]) for name, t in grads[1].items())


@pytest.mark.parametrize("shape", [(9, 5), (19, 64)])  # the loops, a row in a warp's registers
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_bias_and_residual(dtype, shape):
    generator = torch.Generator().manual_seed(1)
    rows, cols = shape
    x = torch.randn(shape, generator=generator).to(dtype)
    weight, shift = torch.randn(2, cols, generator=generator).unbind()
    row = torch.empty(rows)
    got = emulated("layer_norm").run(
        "layer_norm", x=x, bias=None, residual=None, weight=weight, shift=shift, seed=None, p=0.0,
        draw=0, rows=rows, cols=cols, dtype=dtype, eps=1e-5, out=x, sum=x, mean=row, rstd=row,
        written=("out", "sum", "mean", "rstd"))  # fmt: skip
    assert torch.equal(got["sum"], x)
    expected = reference.layer_norm(x.double(), weight.double(), shift.double())
    assert_close(got["out"], expected, dtype, "out")


def test_dropout_is_bitwise_that_of_the_reference():
    for cols in (13, 40):
        x, ones, row = torch.ones(37, cols), torch.ones(cols), torch.empty(37)
        got = emulated("layer_norm").run(
            "layer_norm", x=x, bias=None, residual=None, weight=ones, shift=ones, out=x, sum=x,
            mean=row, rstd=row, rows=37, cols=cols, dtype=x.dtype, p=0.3, draw=2**24 - 1, eps=1e-5,
            seed=torch.tensor([-1]))  # fmt: skip
        factor = hidden_dropout_factor(-1, 0.3, 2**24 - 1, (37, cols))
        assert torch.equal(got["sum"], factor.float())
