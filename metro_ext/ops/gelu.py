"""GELU with its bias, in one pass."""

from typing import Any

import torch
from torch import Tensor

from metro_ext import _C  # noqa: F401  (registers torch.ops.metro)
from metro_ext.ops.first_order import first_order


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias), exact: z·Φ(z) with z = x + bias (Hendrycks & Gimpel, arXiv 1606.08415).

    Args:
        x: activations [..., F], float32 or bfloat16 (float16 on CUDA).
        bias: float32 [F].

    Returns:
        Activations like ``x``, contiguous.

    The backward pass recomputes z from ``x``. Both gradients are deterministic.

    Raises:
        RuntimeError: a shape, dtype or device is not as above.
    """
    return torch.ops.metro.bias_gelu(x, bias)


@torch.library.register_fake("metro::bias_gelu")
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("metro::bias_gelu_backward")
def _(grad_out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


@torch.library.register_fake("metro::bias_gelu_backward_")
def _(grad_out: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


@first_order("metro::bias_gelu")
def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.metro.bias_gelu_backward(grad_out, *ctx.saved_tensors)


torch.library.register_autograd("metro::bias_gelu", _backward, setup_context=_setup_context)
