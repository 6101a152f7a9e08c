"""AdamW as METRO's recipe uses it, and its learning-rate schedule."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from metro_ext.config_schema import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of optimizer step ``step`` (from 1): linear warm-up to ``lr``, then linear decay.

    The decay would reach 0 one step after the last, so that no step is spent on a rate of 0. The
    warm-up takes at most the whole run, however long it is configured.
    """
    warmup = min(config.warmup_steps, total_steps)
    if step <= warmup:
        return config.lr * step / max(1, warmup)
    return config.lr * (total_steps + 1 - step) / (total_steps + 1 - warmup)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, the relative bias."""
    return parameter.dim() == 2 and not name.endswith("relative_bias")


class HasParameters(Protocol):
    """A module, or an engine that holds one."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101) by torch's fused kernel.

    A thin class over ``torch.optim.adamw.adamw``: ``torch.optim.AdamW`` loads the compiler, 70 MB
    that a training process has no other use for, and knows parameters by number instead of by name.

    Args:
        model: its parameters are updated, shared ones once.
        config: betas, epsilon and weight decay.
    """

    def __init__(self, model: HasParameters, config: OptimConfig):
        self.config = config
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        # One count a parameter, on its device: what the fused kernel asks for.
        self.steps = {
            name: torch.zeros((), dtype=torch.float32, device=p.device)
            for name, p in self.parameters.items()
        }

    def zero_grad(self) -> None:
        """Frees all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float | Tensor, failed: Tensor | None = None) -> None:
        """One update; parameters without a gradient stay as they are.

        Args:
            rate: the learning rate. As a tensor [] (float32 on CUDA, float64 on the CPU) it is
                read when the update runs.
            failed: float32 [] on the device of the parameters; 1: the update and its count are
                left out, 0 or None: they are made.
        """
        for decay in (True, False):
            gradients = {
                name: parameter.grad
                for name, parameter in self.parameters.items()
                if parameter.grad is not None and decays(name, parameter) == decay
            }
            if not gradients:
                continue
            names = list(gradients)
            adamw(
                [self.parameters[name] for name in names],
                list(gradients.values()),
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                [],
                [self.steps[name] for name in names],
                fused=True,
                found_inf=failed,
                amsgrad=False,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                lr=rate,
                weight_decay=self.config.weight_decay if decay else 0.0,
                eps=self.config.eps,
                maximize=False,
            )

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""
        return {
            f"{key}.{name}": value
            for key, values in self._state().items()
            for name, value in values.items()
        }

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; raises KeyError where one is missing."""
        for key, values in self._state().items():
            for name, value in values.items():
                value.copy_(tensors[f"{key}.{name}"])

    def _state(self) -> dict[str, dict[str, Tensor]]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.steps}
