"""Every operator in plain PyTorch, meant for float64: the one source of truth for the tests."""

import math

import torch
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
