"""The CUDA kernels of pretrain_loss, emulated, against the float64 reference."""

import pytest
import reference
import torch
from emulation import emulated

WEIGHTS = (1.5, 50.0, 0.7)  # those of emulation/entries/loss.cpp


def token_part(rows, generator):
    target = torch.arange(rows)
    target[1::4] = -100
    hit = torch.randint(2, (rows,), generator=generator).to(torch.uint8)
    return torch.rand(rows, generator=generator), hit, target


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("denominators", [None, (100.0, 7.5, 0.0)])
@pytest.mark.parametrize("rows", [(50, 333, 41), (1, 1, 0), (0, 2500, 1100), (0, 0, 3)])
def test_matches_reference(rows, denominators, order):
    generator = torch.Generator().manual_seed(0)
    mlm_rows, rtd_rows, clm_rows = rows
    mlm, clm = token_part(mlm_rows, generator), token_part(clm_rows, generator)
    label = torch.tensor([0, 1, 255], dtype=torch.uint8)[torch.arange(rtd_rows) % 3]
    rtd = (*torch.randn(2, rtd_rows, generator=generator).unbind(), label)
    given = None if denominators is None else torch.tensor(denominators)
    leaves = [part[0].double().requires_grad_() for part in (mlm, rtd, clm)]
    parts = [(leaf, *part[1:]) for leaf, part in zip(leaves, (mlm, rtd, clm), strict=True)]
    loss, metrics = reference.pretrain_loss(*parts, given, WEIGHTS)
    gradients = torch.autograd.grad(3 * loss, leaves, allow_unused=True, materialize_grads=True)
    common = {"mlm_target": mlm[2], "label": label, "clm_target": clm[2], "denominators": given,
              "mlm_rows": mlm_rows, "rtd_rows": rtd_rows, "clm_rows": clm_rows,
              "order": order}  # fmt: skip
    kernels = emulated("loss")
    got = kernels.run(
        "pretrain_loss", **common, mlm_nll=mlm[0], mlm_hit=mlm[1], rtd_loss=rtd[0],
        rtd_logit=rtd[1], clm_nll=clm[0], clm_hit=clm[1], loss=torch.empty(1),
        metrics=torch.empty(12), written=("loss", "metrics"),
    )  # fmt: skip
    torch.testing.assert_close(got["loss"][0].double(), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["metrics"].double(), metrics, rtol=1e-6, atol=0)
    names = ("grad_mlm", "grad_rtd", "grad_clm")
    outputs = {name: torch.empty(n) for name, n in zip(names, rows, strict=True)}
    got = kernels.run("pretrain_loss_backward", **common, **outputs, metrics=got["metrics"],
                      grad_loss=torch.tensor([3.0]), written=names)  # fmt: skip
    for name, expected in zip(names, gradients, strict=True):
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-6, atol=0)
