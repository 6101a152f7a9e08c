"""The whole METRO training step beside the same model from another library.

    python bench/step.py --peer hf --precision bf16 [--output FILE.json]

One step: zero the gradients, corrupt, forward, backward, clip, AdamW. The batches are random tokens
in sequences of equal length, so that the peer, which knows no packing, computes nothing in vain.
Every contender lives in its own process and takes its turn; ``peak_mb`` is the peak resident memory
of that process over its whole life (on CUDA: the peak of torch's allocations). With ``bf16`` the
peer runs both by autocast and by bfloat16 weights beside float32 masters; the ratio is to the
fastest. On CUDA our step also runs in a CUDA graph; its time is among the case's figures.

The floor is the useful work in matrix products (`metro_ext.presets.flops_per_token`) over the best
rate of torch's kernels that this run measured, among a large shape and the step's own shapes.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/step.py`

from bench.harness import ABSENT, Case, emit
from bench.peers.sampling import SAMPLING
from bench.timing import MatrixCeiling, Stopwatch, interleave, medians, peak_memory
from bench.workers import Worker, WorkerError, serve
from metro_ext.command_line import run
from metro_ext.config_schema import ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from metro_ext.cuda_graph import WARM_UP_STEPS, GraphedStep, wanted
from metro_ext.errors import UserError
from metro_ext.hardware import keep_freed_memory, peak_flops
from metro_ext.model import FIRST_POSITION, Packing, PretrainingModel
from metro_ext.objective import Objective, mask_count
from metro_ext.optim import AdamW
from metro_ext.parallel import recompute_layers
from metro_ext.presets import flops_per_token

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPECIAL_IDS = range(5)
MASK_ID = 4
BATCHES = 4
CEILINGS, OURS, GRAPHED = "ceilings", "ours", "ours graphed"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/step.py",
        description="Time the whole METRO training step beside its peers.",
        allow_abbrev=False,
    )
    parser.add_argument("--peer", choices=("hf", "none"), default="hf", help="whom to meet")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, default, text in (
        ("layers", 12, "of the main encoder"),
        ("aux-layers", 4, "of the auxiliary encoder"),
        ("hidden", 256, "width of both"),
        ("heads", 4, "attention heads"),
        ("vocab", 65536, "vocabulary"),
        ("tokens", 4096, "a batch"),
        ("seq", 128, "tokens a sequence"),
        ("steps", 7, "timed rounds"),
        ("warmup", 2, "rounds before"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument(
        "--sampling", choices=tuple(SAMPLING), default="cdf", help="of the peer (cdf, the fastest)"
    )
    parser.add_argument(
        "--peers-keep-memory", action="store_true", help="our allocator setting for the peers too"
    )
    parser.add_argument(
        "--recompute", default=RunConfig().recompute, help="of ours, as run.recompute (%(default)s)"
    )
    parser.add_argument("--compile-ours", action="store_true", help="ours through torch.compile")
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="only these peers, as the table names them"
    )
    parser.add_argument("--output", metavar="FILE", help="write the JSON too, to bench/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if min(options.steps, options.seq, options.tokens) < 1 or options.warmup < 0:
        raise UserError("--steps, --seq and --tokens must be at least 1, --warmup at least 0")
    if options.tokens % options.seq:
        raise UserError(
            f"--tokens must be a multiple of --seq, found {options.tokens} and {options.seq}"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no CUDA device; use --device cpu")


def configs(options: argparse.Namespace) -> tuple[ModelConfig, ObjectiveConfig, OptimConfig]:
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


def random_batches(options: argparse.Namespace) -> list[Tensor]:
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

    def __init__(self, options: argparse.Namespace):
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

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        tokens, packing = next(self.batches)
        device = tokens.device
        # Positions and boundaries are those of every batch.
        self.tokens = tokens.clone()
        self.packing = dataclasses.replace(packing, seed=packing.seed.clone())
        self.rate = torch.tensor(self.optim.lr, device=device)
        self.loss = torch.zeros((), device=device)
        self.graphed = GraphedStep(self._take_in_place, device)
        for _ in range(WARM_UP_STEPS + 1):  # the last of these captures
            self()

    def _take_in_place(self) -> None:
        self.loss.copy_(self._take(self.tokens, self.packing, self.rate))

    def __call__(self) -> Tensor:
        tokens, packing = next(self.batches)
        self.tokens.copy_(tokens)
        self.packing.seed.copy_(packing.seed)
        self.graphed()
        return self.loss.clone()


def own_names(options: argparse.Namespace) -> list[str]:
    """Our contenders; the first is the one that the peers are measured against."""
    graphed = wanted("auto", torch.device(options.device), False, options.compile_ours)
    return [OURS, GRAPHED] if graphed else [OURS]


def peer_names(options: argparse.Namespace) -> list[str]:
    """The contenders beside ours, by the names of the table."""
    if options.peer == "none":
        return []
    # As peers.hf_mpnet.MIXED, which needs transformers to be imported.
    variants = [""] if options.precision == "fp32" else [" autocast", " masters"]
    names = [f"hf {how}{variant}" for how in ("eager", "compiled") for variant in variants]
    unknown = set(options.contenders or ()) - set(names)
    if unknown:
        raise UserError(
            f"--contenders: there is no {', '.join(sorted(unknown))}; choose from "
            + ", ".join(repr(name) for name in names)
        )
    return [name for name in names if not options.contenders or name in options.contenders]


def make_step(name: str, options: argparse.Namespace) -> Callable[[], Tensor]:
    """The contender of that name, built; importing its library is part of it."""
    if name in (OURS, GRAPHED) or options.peers_keep_memory:
        keep_freed_memory()  # as metro_ext.train does
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


def work(options: argparse.Namespace) -> None:
    """A worker's life: one contender, or the matrix products that make the ceiling."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.worker == CEILINGS:
        serve(_ceiling_methods(options, device))
        return
    watch = Stopwatch(device)
    step: Callable[[], Tensor]
    losses: list[Tensor] = []

    def prepare() -> float:
        nonlocal step
        step = make_step(options.worker, options)
        return watch.time(lambda: losses.append(step()))

    serve(
        {
            "prepare": prepare,
            "step": lambda: watch.time(lambda: losses.append(step())),
            "losses": lambda: [float(losses[0]), float(losses[-1])],
            "peak": lambda: peak_memory(device),
            "threads": torch.get_num_threads,
        }
    )


def ceiling_shapes(options: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """Products [m, k] × [k, n] by name: a large one, and those that the step consists of."""
    size = 8192 if options.device == "cuda" else 2048
    tokens, hidden = options.tokens, options.hidden
    masked = mask_count(tokens, ObjectiveConfig().mask_fraction)
    shapes = (
        (size, size, size),
        (tokens, 3 * hidden, hidden),
        (tokens, 4 * hidden, hidden),
        (tokens, hidden, 4 * hidden),
        (masked, options.vocab, hidden),
    )
    return {f"linear {m}x{n}x{k} {options.precision}": (m, n, k) for m, n, k in shapes}


def _ceiling_methods(options: argparse.Namespace, device: torch.device) -> dict[str, Callable]:
    products = {
        name: MatrixCeiling(m, n, k, DTYPES[options.precision], device)
        for name, (m, n, k) in ceiling_shapes(options).items()
    }
    return {
        "names": lambda: list(products),
        "flops": lambda name: products[name].flops,
        "measure": lambda name: products[name](),
        "threads": torch.get_num_threads,
    }


def measure(options: argparse.Namespace, argv: Sequence[str]) -> tuple[Case, dict[str, float], int]:
    """Runs every contender in turns; returns the case, the measured ceilings and the threads."""
    absent: dict[str, str] = {}
    with ExitStack() as stack:

        def start(name: str) -> Worker:
            return stack.enter_context(Worker("bench.step", name, argv))

        ceilings, ours = start(CEILINGS), start("ours")
        first_seconds = {"ours": ours.call("prepare")}
        workers = {"ours": ours}
        for name in [*own_names(options)[1:], *peer_names(options)]:
            worker = start(name)
            try:
                first_seconds[name] = worker.call("prepare")
                workers[name] = worker
            except WorkerError as error:
                absent[name] = ABSENT + str(error)
                worker.close()
        contenders = {
            name: (lambda w=worker: w.call("step")) for name, worker in workers.items()
        } | {
            name: (lambda n=name: ceilings.call("measure", name=n))
            for name in ceilings.call("names")
        }
        times = interleave(contenders, options.steps, options.warmup)
        median = medians(times)
        rates = {
            name: ceilings.call("flops", name=name) / median[name]
            for name in ceilings.call("names")
        }
        peaks = {name: worker.call("peak") / 1e6 for name, worker in workers.items()}
        losses = {name: worker.call("losses") for name, worker in workers.items()}
        threads = ceilings.call("threads")
    model_config, objective_config, _ = configs(options)
    flops = options.tokens * flops_per_token(model_config, objective_config)
    graphed = median.get(GRAPHED, absent.pop(GRAPHED, None))
    case = Case(
        name=f"step {options.layers}x{options.hidden} aux {options.aux_layers}x{options.hidden} "
        f"vocabulary {options.vocab} tokens {options.tokens // options.seq}x{options.seq} "
        f"{options.precision} {options.device}",
        ours=median["ours"],
        peers={name: median[name] for name in workers if name not in (OURS, GRAPHED)} | absent,
        floor_seconds=flops / max(rates.values()),
        peak_mb=peaks.pop("ours"),
        peers_peak_mb=peaks,
        spread={name: (min(times[name]), max(times[name])) for name in workers},
        figures={
            "tokens_per_s": {name: options.tokens / median[name] for name in workers},
            "gflop": flops / 1e9,
            **({} if graphed is None else {"ours_graphed_seconds": graphed}),
            **_utilisation(options, flops, {name: median[name] for name in workers}),
            "masked": mask_count(options.tokens, objective_config.mask_fraction),
            "first_step_seconds": first_seconds,
            "first_and_last_loss": losses,
            "peer_sampling": options.sampling,
            "ours_compiled": options.compile_ours,
            "rounds": options.steps,
        },
    )
    return case, {f"{name} GFLOP/s": rate / 1e9 for name, rate in rates.items()}, threads


def _utilisation(
    options: argparse.Namespace, flops: float, seconds: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Model FLOPs utilisation by contender: useful FLOP/s over the data sheet's, on CUDA alone."""
    if options.device != "cuda":
        return {}
    peak = peak_flops(torch.device("cuda"), DTYPES[options.precision])
    return {"mfu": {name: flops / time / peak for name, time in seconds.items()}}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if options.worker:
        work(options)
        return
    case, ceilings, threads = measure(options, argv)
    emit(
        "step", [case], ceilings=ceilings, threads=threads, device=options.device,
        output=options.output,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
