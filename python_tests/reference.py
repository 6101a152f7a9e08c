"""Every operator in plain PyTorch, meant for float64: the one source of truth for the tests."""

import math

import torch
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def vocab_logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return hidden @ weight.T + bias


def vocab_head(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The negative log-likelihood of each row; 0 where the target is -100."""
    logits = vocab_logits(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=-100)
