"""The weighted pretraining objective and its figures, in one launch."""

from typing import Any

import torch
from torch import Tensor

from metro_ext import _C  # noqa: F401  (registers torch.ops.metro)
from metro_ext.ops.first_order import first_order

# Sums and counts over the rows that count; add them over micro-batches and ranks, then divide.
METRICS = (
    "mlm_nll_sum",
    "mlm_hits",
    "mlm_count",
    "replaced_count",  # label 1
    "rtd_loss_sum",
    "rtd_hits",  # (logit > 0) == label
    "rtd_count",  # label 0 or 1
    "rtd_predicted_replaced",  # logit > 0
    "rtd_true_positive",  # logit > 0 and label 1
    "clm_nll_sum",
    "clm_hits",
    "clm_count",
)

Part = tuple[Tensor, Tensor, Tensor]


def pretrain_loss(
    *,
    mlm: Part | None = None,
    rtd: Part | None = None,
    clm: Part | None = None,
    denominators: Tensor | None = None,
    mlm_weight: float = 1.0,
    rtd_weight: float = 50.0,
    clm_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """mlm_weight · mean MLM + rtd_weight · mean RTD + clm_weight · mean CLM (arXiv 2204.06644).

    At least one part is given; the sizes of the parts are independent.

    Args:
        mlm: negative log-likelihood float32 [N] in nats, hit uint8 [N], target int64 [N]; rows with
            target -100 do not count.
        rtd: loss float32 [T], logit float32 [T], label uint8 [T]; rows with label 255 do not count.
        clm: as ``mlm``, [M].
        denominators: float32 [3], what the sums of MLM, RTD and CLM are divided by: the counts of
            the whole batch, where this call sees a part of it. None: this call's own counts.
        mlm_weight, rtd_weight, clm_weight: weights of the means.

    Returns:
        loss: float32 []. A part whose denominator is 0 contributes 0.
        metrics: float32 [12], named by ``METRICS``, without gradient. Sums are taken in float64; a
            count is exact up to 2^24, beyond which float32 rounds it.

    Raises:
        RuntimeError: a shape, dtype or device is not as above, or no part is given.
    """
    absent = (None, None, None)
    parts = (*(mlm or absent), *(rtd or absent), *(clm or absent))
    if all(part is None for part in parts):
        raise RuntimeError("metro::pretrain_loss: expected mlm, rtd or clm, found None for all")
    return torch.ops.metro.pretrain_loss(*parts, denominators, mlm_weight, rtd_weight, clm_weight)


def row_gradient(weight: float, target: Tensor, denominator: Tensor | None = None) -> Tensor:
    """The gradient of :func:`pretrain_loss` by the nll of a row that counts, known beforehand.

    Args:
        weight: of the part, ``mlm_weight`` or ``clm_weight``.
        target: int64 [N], the part's; rows with -100 do not count.
        denominator: float32 [], the part's; None: its own count.

    Returns:
        float32 [], weight / denominator, or ``weight`` where the denominator is below 1 (no row
        counts then).
    """
    count = (target != -100).sum() if denominator is None else denominator
    return weight / count.clamp_min(1)


@torch.library.register_fake("metro::pretrain_loss")
def _(
    mlm_nll: Tensor | None,
    mlm_hit: Tensor | None,
    mlm_target: Tensor | None,
    rtd_loss: Tensor | None,
    rtd_logit: Tensor | None,
    label: Tensor | None,
    clm_nll: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    given = next(t for t in (mlm_nll, rtd_loss, clm_nll) if t is not None)
    return given.new_empty(()), given.new_empty(len(METRICS))


@torch.library.register_fake("metro::pretrain_loss_backward")
def _(
    grad_loss: Tensor,
    metrics: Tensor,
    mlm_target: Tensor | None,
    label: Tensor | None,
    clm_target: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    parts = (mlm_target, label, clm_target)
    return tuple(metrics.new_empty(0 if t is None else t.shape[0]) for t in parts)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, mlm_target, _, _, label, _, _, clm_target, denominators, *ctx.weights = inputs
    _, metrics = output
    ctx.mark_non_differentiable(metrics)
    ctx.set_materialize_grads(False)  # no zeros for the figures
    ctx.save_for_backward(metrics, mlm_target, label, clm_target, denominators)


@first_order("metro::pretrain_loss")
def _backward(ctx: Any, grad_loss: Tensor, _metrics: Any) -> tuple[Tensor | None, ...]:
    _, *targets, _ = ctx.saved_tensors
    grads = torch.ops.metro.pretrain_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.weights)
    mlm, rtd, clm = (
        None if target is None else grad for grad, target in zip(grads, targets, strict=True)
    )
    return mlm, None, None, rtd, None, None, clm, None, None, None, None, None, None


torch.library.register_autograd("metro::pretrain_loss", _backward, setup_context=_setup_context)
