"""One optimizer step on memory that stays in place; nothing in it waits for the device.

What a step reads is filled in before (`StepInputs`), what it finds out is added up on the device
(`metro_ext.tally`) and read when there is something to report. That a step is a function without
arguments also makes it fit for a CUDA graph (`metro_ext.cuda_graph`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metro_ext.batches import Batch
from metro_ext.config import Config
from metro_ext.distributed import World
from metro_ext.held_out import pack
from metro_ext.model import Packing
from metro_ext.optim import AdamW
from metro_ext.parallel import Local
from metro_ext.relaxed import OuterOptimizer
from metro_ext.tally import Tally

PARTS = 3  # what a loss is divided by: the MLM, RTD and CLM terms of a step


class StepInputs:
    """What a step reads, at addresses that never change.

    batches: the step's micro-batches, (int64 tokens [T], packing) each.
    counts: float64 [3], the MLM, RTD and CLM terms of this step over all ranks. The step replaces
        them by those of the next one.
    upcoming: float64 [3], the terms of the next step in this rank's micro-batches.
    rate: [], the learning rate; float64 on the CPU, where AdamW reads a number, and float32 on
        CUDA, where its kernel reads that.
    number: float64 [], the step's number, from 1; `step` is the same for the host.
    stop: float64 [], 1 where this rank was asked to end.

    Args:
        batches: the micro-batches of any step, for their shapes.
        device: of the memory.
    """

    def __init__(self, batches: Sequence[Batch], device: torch.device):
        self.batches = [_own_memory(*pack(batch, device)) for batch in batches]
        self.counts = torch.zeros(PARTS, dtype=torch.float64, device=device)
        self.upcoming = torch.zeros_like(self.counts)
        rate = torch.float32 if device.type == "cuda" else torch.float64
        self.rate = torch.zeros((), dtype=rate, device=device)
        self.number = torch.zeros((), dtype=torch.float64, device=device)
        self.step = 0
        self.stop = torch.zeros_like(self.number)

    def fill(self, number: int, batches: Sequence[Batch], upcoming: Tensor, rate: float) -> None:
        """Copies the inputs of step `number` in; every batch has the shapes of the first one.

        Raises:
            ValueError: it has not.
        """
        for (tokens, packing), batch in zip(self.batches, batches, strict=True):
            if batch.max_seqlen != packing.max_seqlen:
                raise ValueError(
                    f"StepInputs: expected a max_seqlen of {packing.max_seqlen}, "
                    f"found {batch.max_seqlen}"
                )
            _overwrite(tokens, batch.tokens)
            _overwrite(packing.positions, batch.positions)
            _overwrite(packing.cu_seqlens, batch.cu_seqlens)
            _overwrite(packing.seed, batch.seed)
        _overwrite(self.upcoming, upcoming)
        self.rate.fill_(rate)
        self.number.fill_(number)
        self.step = number


# On the CPU `pack` gives the batch's own tensors.
def _own_memory(tokens: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
    parts = packing.positions.clone(), packing.cu_seqlens.clone()
    return tokens.clone(), Packing(*parts, packing.max_seqlen, packing.seed.clone())


def _overwrite(static: Tensor, new: Tensor) -> None:
    if static.shape != new.shape or static.dtype != new.dtype:  # copy_ would broadcast or convert
        raise ValueError(
            f"StepInputs: expected {static.dtype} of shape {list(static.shape)}, "
            f"found {new.dtype} of shape {list(new.shape)}"
        )
    if static.is_cuda:
        new = new.pin_memory()  # a copy from pageable memory waits for the device
    static.copy_(new, non_blocking=True)


class TrainStep:
    """Gradients of the micro-batches, clipping and the update, from `inputs` into `tally`.

    Args:
        config: of the run.
        engine: the model, as it is spread over the ranks.
        optimizer: over the engine's parameters.
        world: this rank among all; sums are taken over it.
        inputs: read, but for `counts`.
        tally: added to.
        outer: of relaxed synchronisation, where a step whose gradients are not exchanged divides
            by this rank's own counts, and a tally is this rank's part.
    """

    def __init__(
        self,
        config: Config,
        engine: Local,
        optimizer: AdamW,
        world: World,
        inputs: StepInputs,
        tally: Tally,
        outer: OuterOptimizer | None = None,
    ):
        self.engine, self.optimizer, self.world = engine, optimizer, world
        self.inputs, self.tally, self.outer = inputs, tally, outer
        self.max_norm = config.optim.clip_norm or math.inf
        self.has_parts = config.run.accumulation > 1  # then no micro-batch knows a step's counts

    def __call__(self) -> None:
        inputs, exchanged = self.inputs, self._exchanged(self.inputs.step)
        denominators = inputs.counts.float() if self.has_parts else None
        self.optimizer.zero_grad()
        sums = torch.zeros_like(self.tally.sums)
        for micro, (tokens, packing) in enumerate(inputs.batches, 1):
            last = micro == len(inputs.batches)
            with self.engine.accumulating(last=exchanged and last):
                out = self.engine.run(self.engine.model, tokens, packing, denominators)
                out.loss.backward()
            sums[0] += out.loss.detach().double()
            sums[1:] += out.metrics.detach().double()
        sums = self._share(sums, exchanged)
        norms = self.engine.clip(self.max_norm)
        skip = self.tally.add(inputs.number, sums, norms)
        self.optimizer.step(inputs.rate, skip)

    def _exchanged(self, step: int) -> bool:
        return self.outer is None or self.outer.exchanged(step)

    def _share(self, sums: Tensor, exchanged: bool) -> Tensor:
        """The step's figures, over all ranks unless relaxed; fills in the counts of the next."""
        inputs = self.inputs
        if self.outer is None:
            # The next step's counts travel with this one's figures: one small collective a step.
            shared = torch.cat([sums, inputs.upcoming, inputs.stop.view(1)])
            sums, counts, stop = self.world.sum(shared).split([len(sums), PARTS, 1])
            self.tally.stop.copy_(stop[0])
        else:
            counts = inputs.upcoming
            if self._exchanged(inputs.step + 1):
                counts = self.world.sum(counts.clone())
            if not exchanged:  # a mean over the ranks, once their tallies are added up
                sums[0] /= self.world.size
        inputs.counts.copy_(counts)
        return sums
