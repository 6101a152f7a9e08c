"""Every operator beside its peers and its floor.

    python bench/ops.py [FAMILY ...] [--dtype bf16] [--output FILE.json]

Each case is timed forward (without gradient) and, where it has a gradient, forward and backward
together. Inputs come from memory and not from a cache, as in a training step: on the CPU, calls
take turns over copies of them that no cache holds together; on CUDA the cache is overwritten before
each call. Each contender of a family is a process of its own, which keeps the memory that it frees,
as `metro_ext.train` does: an output that the system maps and zeroes anew at every call costs more
than most kernels (``--fresh-memory`` shows it). ``peak_mb`` is what a call needs at its peak beyond
what was held before it: outputs and gradients (``results_mb``, which no implementation can do
without) and whatever is temporary. Floors: bytes over the copy bandwidth or FLOPs over the rate of
torch's own product, whichever is the longer, both measured in turns with the contenders.

A family is measured in about a minute; each may have a file of its own, as in
``python bench/ops.py attention --output ops-attention.json``.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/ops.py`

from bench.cases import FAMILIES, all_cases
from bench.cases.common import Contender, Inputs, OpCase
from bench.ceilings import Ceilings, worker_methods
from bench.harness import ABSENT, Case, emit
from bench.timing import Stopwatch, Work, interleave, medians, peak_of_call
from bench.workers import Worker, WorkerError, serve
from metro_ext.command_line import run
from metro_ext.errors import UserError
from metro_ext.hardware import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64}
FORWARD, BOTH = "forward", "forward + backward"
CEILINGS = "ceilings"
COLD_BYTES = 128 << 20  # several times a last-level cache
MOST_COPIES = 64
PAUSE_SECONDS = 0.02
SHORT_SECONDS = 0.05  # longer calls do not notice how they begin


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/ops.py",
        description="Time every operator beside its peers and its floor.",
        allow_abbrev=False,
    )
    names = ", ".join(FAMILIES)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{names} (default: all)")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "both"), default="both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, at most (15)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before (1)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="a case in a mode, after five rounds (10)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes: does everything run? times mean nothing"
    )
    parser.add_argument(
        "--fresh-memory", action="store_true", help="on the CPU, map every large output anew"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave compiled peers out")
    parser.add_argument("--output", metavar="FILE", help="write the JSON too, to bench/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.dtype = ["bf16", "fp32"] if options.dtype == "both" else [options.dtype]
    for family in options.families:
        if family not in FAMILIES:
            raise UserError(f"there is no operator family {family!r}; choose from {names}")
    if options.rounds < 1 or options.warmup < 0:
        raise UserError("--rounds must be at least 1 and --warmup at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no CUDA device; use --device cpu")
    return options


class Bench:
    """One contender of one case, in its worker."""

    def __init__(
        self,
        case: OpCase,
        contender: Contender,
        dtype: str,
        device: torch.device,
        fresh_memory: bool = False,
    ):
        self.case, self.device, self.fresh_memory = case, device, fresh_memory
        inputs = case.inputs(DTYPES[dtype], device)
        if contender.as_activations:
            inputs = _as_activations(inputs, case.activations)
        self.inputs = itertools.cycle(
            [
                {
                    name: tensor.clone().requires_grad_(name in case.gradients)
                    for name, tensor in inputs.items()
                }
                for _ in range(_copies(inputs, device))
            ]
        )
        self.function = contender.build()
        self.leaves_out_work = bool(contender.lesser)
        self.watch = Stopwatch(device, evict=device.type == "cuda")
        self.grad_out: Tensor | None = None
        self.seconds = 0.0  # of the last call

    def forward(self) -> tuple[Any, ...]:
        with torch.no_grad():
            return _as_tuple(self.function(**next(self.inputs)))

    def both(self) -> tuple[Any, ...]:
        inputs = next(self.inputs)
        out = _as_tuple(self.function(**inputs))
        leaves = [inputs[name] for name in self.case.gradients]
        gradients = torch.autograd.grad(
            out[0], leaves, self.grad_out, allow_unused=self.leaves_out_work
        )
        return *out, *gradients

    def prepare(self, mode: str) -> tuple[float, float | None]:
        """Compiles; returns MB of what a call gives back, and of its peak beyond what was held."""
        if mode == BOTH and self.grad_out is None:
            self.grad_out = torch.ones_like(self.forward()[0])
        call = self._call(mode)
        call()  # compiles, and fills whatever is kept between calls
        results = sum(t.numel() * t.element_size() for t in call() if isinstance(t, Tensor))
        peak = peak_of_call(self.device, call)
        if not self.fresh_memory:
            keep_freed_memory()
        return results / 1e6, None if peak is None else peak / 1e6

    def run(self, mode: str) -> float:
        """Seconds of a call. On the CPU a short one follows another, as in a step: the threads of
        the pool are awake, and on cores of their own."""
        call = self._call(mode)
        if self.device.type == "cpu" and self.seconds < SHORT_SECONDS:
            call()
        self.seconds = self.watch.time(call)
        return self.seconds

    def _call(self, mode: str) -> Callable[[], tuple[Any, ...]]:
        return self.both if mode == BOTH else self.forward


def _copies(inputs: Inputs, device: torch.device) -> int:
    """How many copies of the inputs outgrow a CPU's caches; small ones may stay in them."""
    if device.type == "cuda":
        return 1
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())
    return min(MOST_COPIES, -(-COLD_BYTES // size))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _as_activations(inputs: Inputs, activations: str) -> Inputs:
    dtype = inputs[activations].dtype
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


def work(options: argparse.Namespace) -> None:
    """A worker's life: one contender of a family, or the ceilings."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.worker == CEILINGS:
        serve(worker_methods(device, {name: DTYPES[name] for name in options.dtype}))
        return
    cases = {case.name: case for case in all_cases(options.device, options.small)}
    bench: Bench

    def build(case: str, dtype: str) -> None:
        nonlocal bench
        # Graphs are kept by code object, a few for each: those of earlier cases would count.
        torch.compiler.reset()
        contender = cases[case].contenders[options.worker]
        bench = Bench(cases[case], contender, dtype, device, options.fresh_memory)

    serve(
        {
            "build": build,
            "prepare": lambda mode: bench.prepare(mode),
            "run": lambda mode: bench.run(mode),
        }
    )


class Crew:
    """The contenders of a family, each in one process from its first case on."""

    def __init__(self, stack: ExitStack, argv: Sequence[str]):
        self.stack, self.argv = stack, argv
        self.workers: dict[str, Worker] = {}

    def call(self, name: str, method: str, **arguments: Any) -> Any:
        if name not in self.workers:
            worker = Worker("bench.ops", name, self.argv)
            self.workers[name] = self.stack.enter_context(worker)
        return self.workers[name].call(method, **arguments)

    def dismiss(self, name: str) -> None:
        """The next case gets a new process."""
        self.workers.pop(name).close()


def measure_case(
    case: OpCase, dtype: str, crew: Crew, options: argparse.Namespace, ceilings: Ceilings
) -> list[Case]:
    """All contenders of a case in turns: the forward pass, then both passes."""
    absent = {
        name: ABSENT + why for name in case.contenders if (why := _why_not(case, name, options))
    }
    present = [name for name in case.contenders if name not in absent]
    done = []
    for mode in (FORWARD, BOTH) if case.gradients else (FORWARD,):
        work = (case.both if mode == BOTH else case.forward)(DTYPES[dtype].itemsize)
        results, peaks = _prepare(case, dtype, mode, crew, present, absent)
        times = interleave(
            {name: (lambda n=name, m=mode: crew.call(n, "run", mode=m)) for name in present}
            | ceilings.beside(work, dtype),
            options.rounds,
            options.warmup,
            pause=_pause(options),
            seconds=options.seconds,
        )
        floor, rates = ceilings.floor(work, dtype, medians(times))
        times = {name: times[name] for name in present}
        results_of = {"floor": floor, "results_mb": results, "work": work, "rates": rates}
        done.append(_result(case, f"{dtype} {mode}", times, peaks, absent, **results_of))
    return done


def _pause(options: argparse.Namespace) -> float:
    return PAUSE_SECONDS if options.device == "cpu" else 0.0


def _why_not(case: OpCase, name: str, options: argparse.Namespace) -> str:
    """Why a contender takes no part in the case; empty if it does."""
    compiled = name.startswith("compiled")
    left_out = "left out by --no-compile" if compiled and options.no_compile else ""
    return case.contenders[name].absent or left_out


def _prepare(
    case: OpCase, dtype: str, mode: str, crew: Crew, present: list[str], absent: dict[str, str]
) -> tuple[float, dict[str, float | None]]:
    """Readies every contender; a peer that fails becomes absent. MB of our results, and peaks."""
    results, peaks = 0.0, {}
    for name in list(present):
        try:
            if mode == FORWARD:
                crew.call(name, "build", case=case.name, dtype=dtype)
            given_back, peaks[name] = crew.call(name, "prepare", mode=mode)
        except WorkerError as error:
            if name == "ours":
                raise
            absent[name] = ABSENT + str(error)
            present.remove(name)
            crew.dismiss(name)
            continue
        results = given_back if name == "ours" else results
    return results, peaks


def _result(
    case: OpCase,
    variant: str,
    times: dict[str, list[float]],
    peaks: dict[str, float | None],
    absent: dict[str, str],
    *,
    floor: float,
    results_mb: float,
    work: Work,
    rates: dict[str, float],
) -> Case:
    median = medians(times)
    peak = peaks["ours"]
    beyond = None if peak is None else peak - results_mb
    return Case(
        name=f"{case.name} {variant}",
        ours=median["ours"],
        peers={name: value for name, value in median.items() if name != "ours"} | absent,
        lesser={
            name: contender.lesser
            for name, contender in case.contenders.items()
            if contender.lesser and name in median
        },
        floor_seconds=floor,
        peak_mb=peak,
        peers_peak_mb={n: mb for n, mb in peaks.items() if n != "ours" and mb is not None},
        spread={name: (min(values), max(values)) for name, values in times.items()},
        figures={
            "family": case.family,
            "rounds": len(times["ours"]),
            "results_mb": results_mb,
            "beyond_results_mb": beyond,
            "gb_per_s": work.bytes / median["ours"] / 1e9,
            "gflop_per_s": work.flops / median["ours"] / 1e9,
            **rates,
        },
    )


def measure(
    options: argparse.Namespace, argv: Sequence[str]
) -> tuple[list[Case], dict[str, float], int]:
    families = options.families or list(FAMILIES)
    results = []
    with Worker("bench.ops", CEILINGS, argv) as worker:
        ceilings = Ceilings(worker, options.rounds, options.warmup, _pause(options))
        for family in families:
            with ExitStack() as stack:
                crew = Crew(stack, argv)
                for case in FAMILIES[family].cases(options.device, options.small):
                    for dtype in _dtypes(case, options.dtype):
                        results += measure_case(case, dtype, crew, options, ceilings)
                        print(f"measured {case.name} {dtype}", file=sys.stderr, flush=True)
        return results, ceilings.rates, worker.call("threads")


def _dtypes(case: OpCase, wanted: Iterable[str]) -> list[str]:
    """Those wanted that the case knows; the one that it has, where it knows neither."""
    return [dtype for dtype in case.dtypes if dtype in wanted] or list(case.dtypes)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if options.worker:
        work(options)
        return
    cases, ceilings, threads = measure(options, argv)
    emit(
        "ops", cases, ceilings=ceilings, threads=threads, device=options.device,
        output=options.output,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
