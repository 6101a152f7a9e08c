"""Training of one seed and prediction."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from metro_ext.config_schema import OptimConfig
from metro_ext.finetune.examples import Row
from metro_ext.finetune.heads import Classifier
from metro_ext.model import Encoder, Packing
from metro_ext.optim import AdamW, learning_rate
from metro_ext.text_encoder import EncodedTexts

EVALUATION_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyper-parameters; the defaults are the published ones of the ++ sizes (COCO-LM, T-NLRv5)."""

    epochs: float = 10
    batch: int = 32
    lr: float = 2e-5
    warmup: float = 1 / 16
    weight_decay: float = 0.01
    layer_decay: float = 1.0
    dtype: torch.dtype = torch.float32


def defaults(task: str, small: bool, hidden: int) -> Settings:
    """The paper's epochs and batch of a task; the rate grows as the width falls below base.

    base and larger: 2e-5 (published range 1e-5 to 4e-5; 1e-5 for hidden sizes from 1024). Smaller
    models, for which nothing is published, take ELECTRA-Small's 3e-4.
    """
    epochs = {"mnli": 2, "record": 2, "squad1": 3, "squad2": 3}.get(task, 10 if small else 5)
    lr = 3e-4 if hidden < 768 else 2e-5 if hidden < 1024 else 1e-5
    return Settings(epochs=epochs, batch=16 if small else 32, lr=lr)


class Trainable(Protocol):
    """A module with an ``encoder``, and the loss of packed rows and their labels."""

    encoder: Encoder

    def loss(
        self,
        tokens: Tensor,
        packing: Packing,
        labels: list[Any],
        dtype: torch.dtype,
        generator: torch.Generator,
        /,
    ) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def train(self) -> Any: ...


class _Named:
    """Some parameters of a model, as `AdamW` asks for them."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self._parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._parameters.items())


def depth_groups(model: Trainable, layers: int) -> dict[int, dict[str, nn.Parameter]]:
    """Parameters by their distance from the head: 0 the head, layers + 1 the embeddings."""
    groups: dict[int, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.layers."):
            depth = layers - int(name.split(".")[2])
        else:
            depth = layers + 1 if name.startswith("encoder.") else 0
        groups.setdefault(depth, {})[name] = parameter
    return groups


def train(
    model: Trainable,
    examples: Sequence[Sequence[Row]],
    labels: list,
    settings: Settings,
    seed: int,
    say: Callable[[str], None] = print,
) -> None:
    """Trains on encoded examples; the same seed gives the same weights.

    examples: the rows of each; those of a batch are packed one after another.
    labels: what ``model.loss`` takes, one an example. The model stays on its device.
    AdamW (0.9, 0.98), eps 1e-6, linear warm-up and decay, no clipping; each depth has the rate
    lr · layer_decay^depth.
    """
    config = model.encoder.config
    steps = max(1, math.ceil(settings.epochs * len(examples) / settings.batch))
    optim = OptimConfig(
        lr=settings.lr,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
    )
    groups = depth_groups(model, config.layers)
    optimizers = {depth: AdamW(_Named(group), optim) for depth, group in groups.items()}
    order, dropout = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.train()
    waiting: list[int] = []
    for step in range(1, steps + 1):
        while len(waiting) < settings.batch:
            waiting += order.permutation(len(examples)).tolist()
        chosen, waiting = waiting[: settings.batch], waiting[settings.batch :]
        rows = [row for i in chosen for row in examples[i]]
        draws = seed * 1_000_003 + step
        packed = EncodedTexts.pack(rows, config.sequence_length, draws, device)
        own = [labels[i] for i in chosen]
        loss = model.loss(packed.tokens, packed.packing, own, settings.dtype, dropout)
        loss.backward()
        rate = learning_rate(step, steps, optim)
        for depth, optimizer in optimizers.items():
            optimizer.step(rate * settings.layer_decay**depth)
            optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            say(f"  seed {seed}  step {step}/{steps}  loss {loss.item():.4f}  lr {rate:.2e}")


@torch.no_grad()
def predict(model: Classifier, rows: list[Row], dtype: torch.dtype) -> np.ndarray:
    """Logits float32 [N, labels]."""
    model.eval()
    limit = model.encoder.config.sequence_length
    device = next(model.parameters()).device
    found: list[Tensor] = []
    generator = torch.Generator()  # evaluation draws nothing from it
    for first in range(0, len(rows), EVALUATION_BATCH):
        own = EncodedTexts.pack(rows[first : first + EVALUATION_BATCH], limit, device=device)
        found.append(model(own.tokens, own.packing, dtype, generator).cpu())
    return torch.cat(found).numpy()
