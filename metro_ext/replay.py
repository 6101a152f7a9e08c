"""Takes up a run that ended on steps without a finite loss and gradient, and says where it broke.

python -m metro_ext.replay RUN

The run left the weights that those steps met and the numbers of their batches in RUN/faults. The
first step is made again, in one process, with every module watched.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from metro_ext.checkpoint import load_checkpoint
from metro_ext.command_line import run
from metro_ext.config import from_dict
from metro_ext.config_schema import ParallelConfig
from metro_ext.distributed import World
from metro_ext.errors import UserError
from metro_ext.held_out import pack
from metro_ext.objective import FIGURES
from metro_ext.prepare import prepare
from metro_ext.trainer import FAULTS, Trainer


@dataclass(frozen=True)
class Replayed:
    """What one micro-batch of the step gave.

    loss: of the micro-batch.
    figures: its sums and counts, by the names of ``metro_ext.objective.FIGURES``.
    module: the first module whose output was not finite; None: all were.
    gradients: parameters whose gradient was not finite, the one nearest to the loss first.
    """

    batch: dict
    loss: float
    figures: dict[str, float]
    module: str | None
    gradients: list[str]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and not self.gradients


def replay(folder: Path) -> tuple[int, list[Replayed]]:
    """Makes the first skipped step again: (its number, what each of its micro-batches gave).

    Args:
        folder: of the run.

    Raises:
        UserError: the run left no faults, or its data or tokenizer have changed since.
    """
    if not (folder / FAULTS).is_dir():
        raise UserError(f"{folder}: expected the {FAULTS} of a run that ended on skipped steps, "
                        "found none")  # fmt: skip
    found = load_checkpoint(folder / FAULTS)
    config = from_dict(found.state["config"])
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(folder), graph="off", compile=False),
        parallel=ParallelConfig(),
    )
    trainer = Trainer(prepare(config, print), World())
    if trainer.prepared.tokenizer.sha256 != found.state["tokenizer_sha256"]:
        raise UserError(f"{folder}: the tokenizer is not the one that the run used")
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(found.tensors[f"model.{name}"])
    trainer.model.train()
    step = found.step + 1
    trainer.objective.set_step(step, config.run.steps)
    batches = found.state["batches"]
    denominators = None
    if len(batches) > 1:
        denominators = trainer.terms([trainer.source.batch(one["index"]) for one in batches])
        denominators = denominators.float().to(trainer.device)
    return step, [_micro_batch(trainer, one, denominators) for one in batches]


def _micro_batch(trainer: Trainer, batch: dict, denominators: Tensor | None) -> Replayed:
    made = trainer.source.batch(batch["index"])
    if int(made.seed) != batch["seed"]:
        raise UserError(
            f"batch {batch['index']}: expected seed {batch['seed']}, found {int(made.seed)}: the "
            "corpus is not the one that the run used"
        )
    model = trainer.model
    broken: list[str] = []
    gradients: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, broken))
        for name, module in model.named_modules()
        if name
    ]
    hooks += [
        parameter.register_post_accumulate_grad_hook(_watch_gradient(name, gradients))
        for name, parameter in model.named_parameters()
    ]
    trainer.optimizer.zero_grad()
    try:
        out = trainer.engine.run(model, *pack(made, trainer.device), denominators)
        out.loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    figures = dict(zip(FIGURES, out.metrics.tolist(), strict=True))
    return Replayed(batch, out.loss.item(), figures, broken[0] if broken else None, gradients)


def _watch(name: str, broken: list[str]) -> Callable[..., None]:
    def look(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
        first = output[0] if isinstance(output, tuple) else output  # of a norm, what it gives
        if not torch.isfinite(first).all():
            broken.append(name)

    return look


def _watch_gradient(name: str, broken: list[str]) -> Callable[[Tensor], None]:
    def look(parameter: Tensor) -> None:
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            broken.append(name)

    return look


def _describe(one: Replayed) -> str:
    documents = one.batch["documents"]
    shown = ", ".join(map(str, documents[:10])) + (", ..." if len(documents) > 10 else "")
    lines = [
        "batch {index} (rank {rank}, seed {seed}; ".format(**one.batch)
        + f"documents {shown}): loss {one.loss:.6g}"
    ]
    if one.is_finite:
        lines.append("  loss and gradients are finite here")
    if one.module is not None:
        lines.append(f"  first output that is not finite: {one.module}")
    if one.gradients:
        lines.append(f"  gradients that are not finite: {len(one.gradients)}, the first on the way "
                     f"back: {one.gradients[0]}")  # fmt: skip
    lines += [f"  {name} {one.figures[name]:.6g}" for name in FIGURES if name.endswith("_sum")]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.replay",
        description="Repeat the step that ended a run for want of a finite loss and gradient.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    step, parts = replay(parser.parse_args(argv).run)
    print(f"step {step}:")
    for part in parts:
        print(_describe(part))


if __name__ == "__main__":
    run(main)
