"""Every operator in plain PyTorch, meant for float64: the one source of truth for the tests."""

import math

import torch
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def layer_norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_factor: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``dropout_factor``: what dropout multiplies each element by (0, or 1 / share kept)."""
    z = x if bias is None else x + bias
    if dropout_factor is not None:
        z = z * dropout_factor
    if residual is not None:
        z = z + residual
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + shift


def rtd_head(hidden: Tensor, weight: Tensor, bias: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    """Loss, logit, hits."""
    logit = hidden @ weight + bias
    counted = label != 255
    loss = torch.nn.functional.softplus(torch.where(label == 1, -logit, logit), threshold=1e9)
    hits = ((logit > 0) == (label == 1))[counted].sum()
    return torch.where(counted, loss, 0.0), logit, hits
