"""Relaxed synchronisation: ranks train apart and agree on their weights every so many steps.

An outer optimizer over the ranks' inner AdamW, for slow links between them. After each
``sync.interval`` steps the mean of what the ranks have moved since the last outer step is taken as
a gradient of their common weights, the anchor θ (DiLoCo, arXiv 2311.08105, algorithm 1):

    Δ = mean over ranks of (θ - w)      v ← μ v + Δ      θ ← θ - η (Δ + μ v)      w ← θ

that is Nesterov's momentum as ``torch.optim.SGD`` has it. AdamW's moments stay with their rank.
What the ranks have moved may be sent in fewer bits (``sync.wire``, see `metro_ext.wire`); weights
and v stay float32.

From Pier (arXiv 2511.17849) come two additions. *Momentum warm-up*: the first
``sync.warmup_steps`` are synchronised at every step, and v gathers from the weights' course
meanwhile without acting on it, so that the first outer step has a momentum to go by. *Momentum
decay*: μ moves from ``sync.momentum`` to ``sync.final_momentum`` over the steps after. Its abstract
names both; the course of its coefficients was not to be had, and the line between two values is
ours.

Every rank's micro-batches are those that it has without relaxing, but each step's loss is divided
by the rank's own counts. What comes out depends on the number of ranks by nature. At an outer step,
and in the warm-up, all ranks hold the anchor, and only there a run is evaluated and saved: weights
and v once, of every rank AdamW's moments and what it has yet to send. So a resumed run needs as
many ranks as it was saved on, and is then the unbroken one bit for bit.
"""

import torch
from torch import Tensor

from metro_ext.config_schema import Config, SyncConfig
from metro_ext.distributed import AgreedError, World
from metro_ext.errors import UserError
from metro_ext.wire import wire


def check(config: Config) -> None:
    """Between outer steps ranks have no weights in common to shard, evaluate or save.

    Raises:
        UserError: other settings ask for that, where ``sync.mode`` is ``relaxed``.
    """
    if config.parallel.mode != "ddp":
        raise UserError(
            "sync.mode=relaxed needs all of the model on every process, parallel.mode=ddp; "
            f"found {config.parallel.mode}"
        )
    for key in ("eval_interval", "checkpoint_interval"):
        if getattr(config.run, key) % config.sync.interval:
            raise UserError(
                f"run.{key} must be a multiple of sync.interval where sync.mode is relaxed, "
                f"found {getattr(config.run, key)} for {config.sync.interval}"
            )


class OuterOptimizer:
    """Nesterov's momentum on the weights that the ranks have in common.

    Args:
        parameters: float32, of this rank, by name; updated in place.
        config: interval, warm-up, learning rate and momentum.
        total_steps: of the run; its last step is an outer one.
        world: this rank among all.
    """

    def __init__(
        self, parameters: dict[str, Tensor], config: SyncConfig, total_steps: int, world: World
    ):
        self.config, self.total_steps, self.world = config, total_steps, world
        self.parameters = {name: value.detach() for name, value in parameters.items()}
        self.anchor = {name: value.clone() for name, value in self.parameters.items()}
        self.velocity = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self._wire = wire(config.wire, self.parameters, world)

    def exchanged(self, step: int) -> bool:
        """Whether the gradients of step `step` (from 1) are summed over the ranks."""
        return step <= self.config.warmup_steps

    def due(self, step: int) -> bool:
        """Whether an outer step follows on step `step`; also where the warm-up and the run end."""
        ends = (self.config.warmup_steps, self.total_steps)
        return step % self.config.interval == 0 or step in ends

    def momentum(self, step: int) -> float:
        """μ of the outer step after step `step`: constant in the warm-up, then on a line."""
        config, warmup = self.config, self.config.warmup_steps
        share = (step - warmup) / max(1, self.total_steps - warmup)
        return config.momentum + max(0.0, share) * (config.final_momentum - config.momentum)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """The outer step after step `step`: a collective, unless that step was exchanged.

        Raises:
            AgreedError: a weight of a rank is not finite; on every rank alike.
        """
        momentum = self.momentum(step)
        if self.exchanged(step):  # all ranks have the same weights: nothing is sent
            for name, value in self.parameters.items():
                self.velocity[name].mul_(momentum).add_(self.anchor[name] - value)
                self.anchor[name].copy_(value)
            return
        for name, value in self.parameters.items():
            torch.sub(self.anchor[name], value, out=value)
        if self.world.distributed:
            self._wire.sum(list(self.parameters.values()))
        self._check_finite(step)
        for name, value in self.parameters.items():
            delta, velocity, anchor = (
                value.div_(self.world.size),
                self.velocity[name],
                self.anchor[name],
            )
            velocity.mul_(momentum).add_(delta)
            anchor.sub_(delta.add_(velocity, alpha=momentum), alpha=self.config.lr)
            value.copy_(anchor)

    def _check_finite(self, step: int) -> None:
        """Of the summed deltas, the same on every rank."""
        sums = torch.stack([value.sum() for value in self.parameters.values()])
        if sums.isfinite().all():
            return
        names = [n for n, value in self.parameters.items() if not value.isfinite().all()]
        if names:  # else a sum alone was too large
            raise AgreedError(
                f"the outer step after step {step}: expected finite weights on every rank, found "
                f"others in {names[0]}; try a lower optim.lr or sync.lr, or a longer warm-up, in a "
                "new run"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The state at an outer step, by parameter: v alone, as the anchor is the weights."""
        return self.velocity

    def own_tensors(self) -> dict[str, Tensor]:
        """What each rank has of its own: what it has yet to send, where `sync.wire` rounds."""
        return self._wire.tensors()

    @torch.no_grad()
    def restart(self) -> None:
        """Takes the parameters, just loaded, as the anchor."""
        for name, value in self.parameters.items():
            self.anchor[name].copy_(value)
