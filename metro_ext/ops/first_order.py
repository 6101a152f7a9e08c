"""Backward formulas that cannot be differentiated once more."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(operator: str) -> Callable[[Callable], Callable]:
    """Decorator of the backward formula of an operator that has no second one.

    Autograd records a backward pass only under ``create_graph=True``. What the kernels compute is
    not recorded, so gradients of gradients would lack this operator's part without a word.

    Args:
        operator: its name, for the error.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def refusing(ctx: Any, *grads: Any) -> Any:
            refuse_second_order(operator)
            return backward(ctx, *grads)

        return refusing

    return decorate


def refuse_second_order(operator: str) -> None:
    """RuntimeError in a backward pass that is recorded; see `first_order`."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operator}: expected a backward pass without create_graph=True, found one "
            "with it: there are no gradients of its gradients"
        )
