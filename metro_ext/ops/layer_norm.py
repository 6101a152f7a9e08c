"""Bias, dropout, residual and LayerNorm in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metro_ext import _C  # noqa: F401  (registers torch.ops.metro)
from metro_ext.ops.first_order import first_order


class Normed(NamedTuple):
    """The output of a LayerNorm, and what it can be computed from again.

    Attributes:
        out: activations [..., H].
        sum: like ``out``, the input of the norm, which its backward pass keeps anyway.
        weight, shift: copies of its parameters, float32 [H], without a gradient: an engine that
            shards parameters may have taken the originals away.
        eps: added to the variance.
    """

    out: Tensor
    sum: Tensor
    weight: Tensor
    shift: Tensor
    eps: float

    @staticmethod
    def again(sum: Tensor, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
        """``out``, bit for bit, in a pass over ``sum``.

        Args:
            sum, weight, shift, eps: those of a :class:`Normed`.

        Returns:
            Activations like ``sum``, without a gradient.

        Raises:
            RuntimeError: a shape, dtype or device is not as above.
        """
        return torch.ops.metro.layer_norm(sum, None, None, weight, shift, None, 0.0, 0, eps)[0]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    draw: int = 0,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)) · weight + shift (Ba et al., arXiv 1607.06450).

    Args:
        x: activations [..., H], float32 or bfloat16 (float16 on CUDA).
        weight, shift: scale and offset of the norm, float32 [H].
        bias: added to ``x`` before dropout, float32 [H]; None: zero.
        residual: added after dropout, like ``x``; None: zero.
        seed: key of the dropout mask, one int64 on the device of ``x``; not read when p = 0.
        p: share of elements dropped, in [0, 1], rounded to a multiple of 2^-16; what is kept is
            scaled by 1 / (1 - p).
        draw: tells apart the places of a model that share a seed, in [0, 2^24).
        eps: added to the variance.

    Returns:
        Activations like ``x``.

    The norm is that of the sum rounded to the dtype of ``x``; statistics are float32. The sum is
    written even where no gradient is needed: the norm reads it back while it is in the cache. For
    the backward pass it is kept with two float32 statistics a row; the mask is drawn again. All
    gradients are deterministic.

    Raises:
        RuntimeError: a shape, dtype, device or value is not as above.
    """
    op = torch.ops.metro.layer_norm
    return op(x, bias, residual, weight, shift, seed, p, draw, eps)[0]


def normed(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    draw: int = 0,
    eps: float = 1e-5,
) -> Normed:
    """:func:`layer_norm`, with what its users need to compute its output again.

    Args:
        x, weight, shift, bias, residual, seed, p, draw, eps: as there.

    Returns:
        A :class:`Normed`; its ``out`` is what :func:`layer_norm` gives, and carries the gradients.

    Raises:
        RuntimeError: as there.
    """
    op = torch.ops.metro.layer_norm
    out, sum, _, _ = op(x, bias, residual, weight, shift, seed, p, draw, eps)
    return Normed(out, sum, weight.detach().clone(), shift.detach().clone(), eps)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("metro::layer_norm")
def _(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    p: float,
    draw: int,
    eps: float,
) -> tuple[Tensor, ...]:
    rows = x.new_empty(x.shape[:-1].numel() if x.shape[-1] else 0, dtype=torch.float32)
    return _like(x), _like(x), rows, torch.empty_like(rows)


@torch.library.register_fake("metro::layer_norm_backward")
def _(
    grad_out: Tensor,
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    p: float,
    draw: int,
) -> tuple[Tensor, ...]:
    grad_residual = sum.new_empty(0) if p == 0 else _like(sum)
    return _like(sum), grad_residual, *(torch.empty_like(weight) for _ in range(3))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, bias, residual, weight, _, seed, ctx.p, ctx.draw, _ = inputs
    _, sum, mean, rstd = output
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.mark_non_differentiable(sum, mean, rstd)
    ctx.set_materialize_grads(False)  # those of `sum` would be zeros of its size
    ctx.save_for_backward(sum, mean, rstd, weight, seed)


@first_order("metro::layer_norm")
def _backward(
    ctx: Any, grad_out: Tensor, _sum: Any, _mean: Any, _rstd: Any
) -> tuple[Tensor | None, ...]:
    grad_x, grad_residual, grad_bias, grad_weight, grad_shift = torch.ops.metro.layer_norm_backward(
        grad_out, *ctx.saved_tensors, ctx.p, ctx.draw
    )
    if ctx.p == 0:
        grad_residual = grad_x
    return (
        grad_x,
        grad_bias if ctx.has_bias else None,
        grad_residual if ctx.has_residual else None,
        grad_weight,
        grad_shift,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd("metro::layer_norm", _backward, setup_context=_setup_context)
