"""One contender of the whole step, in the process that ``bench/step.py`` drives."""

import dataclasses
import itertools
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor

from bench.timing import Stopwatch, peak_memory
from bench.workers import serve
from metro_ext.config_schema import ModelConfig, ObjectiveConfig, OptimConfig
from metro_ext.cuda_graph import WARM_UP_STEPS, GraphedStep
from metro_ext.hardware import exact_reductions, keep_freed_memory
from metro_ext.model import FIRST_POSITION, Packing, PretrainingModel
from metro_ext.objective import Objective
from metro_ext.optim import AdamW
from metro_ext.parallel import recompute_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPECIAL_IDS = range(5)
MASK_ID = 4
BATCHES = 4
OURS, GRAPHED = "ours", "ours graphed"
WAKING_STEPS = 2  # after parking: the first takes memory from the device, the next one from torch


def configs(options: Namespace) -> tuple[ModelConfig, ObjectiveConfig, OptimConfig]:
    model = ModelConfig(
        layers=options.layers,
        aux_layers=options.aux_layers,
        hidden=options.hidden,
        ffn=4 * options.hidden,
        heads=options.heads,
        vocab_size=options.vocab,
        sequence_length=options.seq,
    )
    return model, ObjectiveConfig(name="metro"), OptimConfig(lr=1e-4)


def random_batches(options: Namespace) -> list[Tensor]:
    """int64 [S, L] each, ordinary tokens only; the same for every contender."""
    generator = torch.Generator().manual_seed(1)
    shape = (options.tokens // options.seq, options.seq)
    low, high = len(SPECIAL_IDS), options.vocab
    return [
        torch.randint(low, high, shape, generator=generator).to(options.device)
        for _ in range(BATCHES)
    ]


class OurStep:
    """One optimizer step a call, as `metro_ext.train` takes it, on given batches [S, L]."""

    def __init__(self, options: Namespace):
        model_config, objective_config, self.optim = configs(options)
        device = torch.device(options.device)
        self.model = PretrainingModel(model_config, "metro", seed=1).to(device).train()
        recompute_layers(self.model, options.recompute)
        self.optimizer = AdamW(self.model, self.optim)
        special = torch.tensor(SPECIAL_IDS, device=device)
        objective = Objective(objective_config, special, MASK_ID, DTYPES[options.precision])
        self.objective = (
            torch.compile(objective, dynamic=False) if options.compile_ours else objective
        )
        self.early_backward = not options.compile_ours  # as metro_ext.parallel.engine chooses
        self.batches = itertools.cycle(
            [self._pack(batch, seed) for seed, batch in enumerate(random_batches(options))]
        )

    @staticmethod
    def _pack(batch: Tensor, seed: int) -> tuple[Tensor, Packing]:
        count, length = batch.shape
        device = batch.device
        first = torch.arange(count + 1, dtype=torch.int32, device=device) * length
        positions = torch.arange(FIRST_POSITION, FIRST_POSITION + length, device=device)
        packing = Packing(positions.repeat(count), first, length, torch.tensor(seed, device=device))
        return batch.flatten(), packing

    def __call__(self) -> Tensor:
        """The loss [], detached."""
        return self._take(*next(self.batches), self.optim.lr)

    def _take(self, tokens: Tensor, packing: Packing, rate: float | Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.objective(self.model, tokens, packing, early_backward=self.early_backward).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_norm)
        self.optimizer.step(rate)
        return loss.detach()


class OurGraphedStep(OurStep):
    """The same in a CUDA graph, as `metro_ext.train` takes it in one process."""

    def __init__(self, options: Namespace):
        super().__init__(options)
        tokens, packing = next(self.batches)
        device = tokens.device
        # Positions and boundaries are those of every batch.
        self.tokens = tokens.clone()
        self.packing = dataclasses.replace(packing, seed=packing.seed.clone())
        self.rate = torch.tensor(self.optim.lr, device=device)
        self.loss = torch.zeros((), device=device)
        self.graphed: GraphedStep | None = None

    def park(self) -> None:
        """Gives up the graph, which owns the memory of its step; the next call captures another."""
        self.graphed = None

    def _take_in_place(self) -> None:
        self.loss.copy_(self._take(self.tokens, self.packing, self.rate))

    def __call__(self) -> Tensor:
        tokens, packing = next(self.batches)
        self.tokens.copy_(tokens)
        self.packing.seed.copy_(packing.seed)
        if self.graphed is None:
            self.graphed = GraphedStep(self._take_in_place, tokens.device)
            for _ in range(WARM_UP_STEPS):
                self.graphed()
        self.graphed()  # the first after the eager ones captures
        return self.loss.clone()


def make_step(name: str, options: Namespace) -> Callable[[], Tensor]:
    """The contender of that name, built; importing its library is part of it."""
    if name in (OURS, GRAPHED) or options.peers_keep_memory:
        keep_freed_memory()  # as metro_ext.train does
        exact_reductions()
    if name in (OURS, GRAPHED):
        return OurStep(options) if name == OURS else OurGraphedStep(options)
    from bench.peers.hf_mpnet import HuggingFaceStep, MetroFromMPNet

    model_config, objective, optim = configs(options)
    torch.manual_seed(1)
    model = MetroFromMPNet(
        model_config, objective, torch.tensor(SPECIAL_IDS), MASK_ID, options.sampling
    )
    _, how, *mixed = name.split(" ")
    return HuggingFaceStep(
        model,
        optim,
        random_batches(options),
        mixed=mixed[0] if mixed else "",
        compiled=how == "compiled",
    )


class Turns:
    """A contender that takes its turns, and between them holds nothing but what it has to keep.

    On CUDA the contenders share one memory, and each may need most of it for a step: after a turn
    the blocks that torch keeps go back to the device, and a graph with the memory that it owns.
    Steps that are not timed fetch it all again at the beginning of the next turn.

    Args:
        name, options: of the contender, see `make_step`.
    """

    def __init__(self, name: str, options: Namespace):
        self.name, self.options = name, options
        self.device = torch.device(options.device)
        self.watch = Stopwatch(self.device)
        self.losses: list[Tensor] = []

    def prepare(self) -> float:
        """Builds and takes the first step, whose seconds it returns."""
        self.step = make_step(self.name, self.options)
        seconds = self._take()
        self._park()
        return seconds

    def turn(self) -> float:
        """Seconds of a step."""
        if self.device.type == "cuda":
            for _ in range(WAKING_STEPS):
                self._take()
        seconds = self._take()
        self._park()
        return seconds

    def _take(self) -> float:
        return self.watch.time(lambda: self.losses.append(self.step()))

    def _park(self) -> None:
        if self.device.type == "cuda":
            self.step.optimizer.zero_grad()  # a step begins with that anyway
            if isinstance(self.step, OurGraphedStep):
                self.step.park()
            torch.cuda.empty_cache()


def serve_contender(options: Namespace) -> None:
    """A worker's life."""
    turns = Turns(options.worker, options)
    serve(
        {
            "prepare": turns.prepare,
            "step": turns.turn,
            "losses": lambda: [float(turns.losses[0]), float(turns.losses[-1])],
            "peak": lambda: peak_memory(turns.device),
            "threads": torch.get_num_threads,
        }
    )
