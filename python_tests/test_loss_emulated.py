"""The CUDA kernels of pretrain_loss, emulated, against the CPU operator."""

import pytest
import torch
from emulation import emulated

from metro_ext.ops import pretrain_loss


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("denominators", [None, (100.0, 7.5, 0.0)])
@pytest.mark.parametrize("mlm_rows, rtd_rows", [(50, 333), (1, 1), (0, 2500)])
def test_same_as_cpu(mlm_rows, rtd_rows, denominators, order):
    generator = torch.Generator().manual_seed(0)
    nll, rtd_loss = (torch.rand(n, generator=generator) for n in (mlm_rows, rtd_rows))
    hit = torch.randint(2, (mlm_rows,), generator=generator).to(torch.uint8)
    target = torch.arange(mlm_rows)
    target[1::4] = -100
    logit = torch.randn(rtd_rows, generator=generator)
    label = torch.tensor([0, 1, 255], dtype=torch.uint8)[torch.arange(rtd_rows) % 3]
    nll.requires_grad_()
    rtd_loss.requires_grad_()
    given = None if denominators is None else torch.tensor(denominators)
    loss, metrics = pretrain_loss(
        mlm=(nll, hit, target), rtd=(rtd_loss, logit, label), denominators=given,
        mlm_weight=1.5, rtd_weight=50.0, clm_weight=0.7,
    )  # fmt: skip
    expected = torch.autograd.grad(3 * loss, (nll, rtd_loss))
    common = {"mlm_target": target, "label": label, "denominators": given, "mlm_rows": mlm_rows,
              "rtd_rows": rtd_rows, "order": order}  # fmt: skip
    kernels = emulated("loss")
    got = kernels.run(
        "pretrain_loss", **common, mlm_nll=nll, mlm_hit=hit, rtd_loss=rtd_loss, rtd_logit=logit,
        loss=torch.empty(1), metrics=torch.empty(12), written=("loss", "metrics"),
    )  # fmt: skip
    torch.testing.assert_close(got["loss"][0], loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["metrics"], metrics, rtol=1e-6, atol=0)
    got = kernels.run(
        "pretrain_loss_backward", **common, grad_loss=torch.tensor([3.0]), metrics=metrics,
        grad_mlm=torch.empty(mlm_rows), grad_rtd=torch.empty(rtd_rows),
        written=("grad_mlm", "grad_rtd"),
    )  # fmt: skip
    for name, value in zip(("grad_mlm", "grad_rtd"), expected, strict=True):
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=0)
