"""Replaced token detection: one logit a token and its binary cross-entropy."""

from typing import Any

import torch
from torch import Tensor

from metro_ext import _C  # noqa: F401  (registers torch.ops.metro)
from metro_ext.ops.first_order import first_order

ORIGINAL, REPLACED, IGNORED = 0, 1, 255


def rtd_head(
    hidden: Tensor, weight: Tensor, bias: Tensor, label: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Binary cross-entropy of σ(hidden·weight + bias) (ELECTRA, arXiv 2003.10555, section 2).

    Args:
        hidden: activations [T, H], float32 or bfloat16 (float16 on CUDA).
        weight: float32 [H].
        bias: float32 [1].
        label: uint8 [T]: 0 original, 1 replaced, 255 ignored.

    Returns:
        loss: float32 [T], in nats; 0 where ignored.
        logit: float32 [T]; positive says "replaced". Carries no gradient.
        hits: int64 [], how many of the rows not ignored have their logit on the right side of 0.

    Gradients by ``hidden``, ``weight`` and ``bias`` are deterministic.

    Raises:
        RuntimeError: a shape, dtype, device or (on the CPU) label is not as above.
    """
    return torch.ops.metro.rtd_head(hidden, weight, bias, label)


@torch.library.register_fake("metro::rtd_head")
def _(hidden: Tensor, weight: Tensor, bias: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss), hidden.new_empty((), dtype=torch.int64)


@torch.library.register_fake("metro::rtd_head_backward")
def _(
    grad_loss: Tensor, logit: Tensor, hidden: Tensor, weight: Tensor, label: Tensor
) -> tuple[Tensor, ...]:
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return grad_hidden, torch.empty_like(weight), weight.new_empty(1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, _, label = inputs
    _, logit, hits = output
    ctx.mark_non_differentiable(logit, hits)
    ctx.set_materialize_grads(False)  # no zeros for the figures
    ctx.save_for_backward(logit, hidden, weight, label)


@first_order("metro::rtd_head")
def _backward(ctx: Any, grad_loss: Tensor, _logit: Any, _hits: Any) -> tuple[Tensor | None, ...]:
    return *torch.ops.metro.rtd_head_backward(grad_loss, *ctx.saved_tensors), None


torch.library.register_autograd("metro::rtd_head", _backward, setup_context=_setup_context)
