"""AdamW as METRO's recipe uses it, and its learning-rate schedule."""

import torch
from torch import nn

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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms, biases and the relative position bias do not."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and not name.endswith("relative_bias")
        (decayed if matrix else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the model's parameters (shared ones once)."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name, for a checkpoint."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; raises KeyError where a tensor is missing."""
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].to(
                torch.device("cpu") if key == "step" and not parameter.is_cuda else parameter.device
            )
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
