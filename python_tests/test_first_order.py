"""A gradient of a gradient is refused, not wrong without a word."""

import pytest
import torch
from test_devices import CALLS, operators

from metro_ext.ops import vocab_head_loss

OPERATORS = ("bias_gelu", "attention", "layer_norm", "rtd_head", "pretrain_loss")


def outcome(name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A scalar of the operator's first output, and the arguments that it depends on."""
    arguments, leaves = list(CALLS[name]), []
    for i, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[i] = value.clone().requires_grad_()
            leaves.append(arguments[i])
    out = operators()[name](*arguments)
    return (out[0] if isinstance(out, tuple) else out).sum(), leaves


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_gradients_are_refused(name):
    total, leaves = outcome(name)
    with pytest.raises(RuntimeError, match=f"metro::{name}: expected a backward pass without"):
        torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_not(name):
    total, leaves = outcome(name)
    torch.autograd.grad(total, leaves, allow_unused=True)


def test_those_of_the_vocabulary_head_are_refused_too():
    hidden, weight, bias, target, *_ = CALLS["vocab_head"]
    leaves = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
    loss, _ = vocab_head_loss(*leaves, target)
    with pytest.raises(RuntimeError, match="vocab_head_gradients: expected a backward pass with"):
        torch.autograd.grad(loss, leaves, create_graph=True)
    torch.autograd.grad(vocab_head_loss(*leaves, target)[0], leaves)
