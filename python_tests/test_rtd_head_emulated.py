"""The CUDA kernels of rtd_head, emulated, against the float64 reference."""

import pytest
import reference
import torch
from emulation import DTYPES, emulated
from op_checks import assert_close


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("shape", [(7, 5), (0, 8), (4, 0), (70, 257), (333, 64), (65, 768)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, shape, order):
    rows, cols = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(cols, generator=generator) * 3 / max(cols, 1) ** 0.5
    bias = torch.tensor([0.3])
    label = torch.tensor([0, 1, 0, 255], dtype=torch.uint8)
    label = label[torch.randint(4, (rows,), generator=generator)]
    call = {"hidden": hidden, "weight": weight, "label": label, "rows": rows, "cols": cols,
            "dtype": dtype, "order": order}  # fmt: skip
    kernels, row, blocks = emulated("rtd_head"), torch.empty(rows), (rows + 31) // 32
    got = kernels.run("rtd_head", **call, bias=bias, loss=row, logit=row,
                      hits=torch.zeros(1, dtype=torch.int64),
                      partials=torch.zeros(blocks, dtype=torch.int64),
                      written=("loss", "logit", "hits", "partials"))  # fmt: skip
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    loss, logit, hits = reference.rtd_head(*leaves, label)
    assert_close(got["loss"], loss, torch.float32, "loss")
    assert_close(got["logit"], logit, torch.float32, "logit")
    assert int(got["hits"]) == int(hits)
    grad = torch.randn(rows, generator=torch.Generator().manual_seed(3))
    loss.backward(grad.double())
    grads = kernels.run("rtd_head_backward", **call, grad_loss=grad, logit=got["logit"],
                        grad_hidden=hidden, grad_weight=weight, grad_bias=bias,
                        partials=torch.empty(blocks, cols + 1),
                        written=("grad_hidden", "grad_weight", "grad_bias",
                                 "partials"))  # fmt: skip
    assert_close(grads["grad_hidden"], leaves[0].grad, dtype, "grad_hidden")
    assert_close(grads["grad_weight"], leaves[1].grad, torch.float32, "grad_weight")
    assert_close(grads["grad_bias"], leaves[2].grad, torch.float32, "grad_bias")
