"""Every operator beside its peers and its floor.

    python bench/ops.py [FAMILY ...] [--dtype bf16] [--output FILE.json]

Each case is timed forward (without gradient) and, where it has a gradient, forward and backward
together. Inputs come from memory and not from a cache, as in a training step: on the CPU, calls
take turns over copies of them that no cache holds together; on CUDA the cache is overwritten before
each call. Each contender of a case is a process of its own; ``peak_mb`` is what a call needs at its
peak beyond what was held before it: outputs and gradients (``results_mb``, which no implementation
can do without) and whatever is temporary. Floors: bytes over the measured copy bandwidth or FLOPs
over the measured matrix rate, whichever is the longer.
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
from bench.harness import ABSENT, Case, emit
from bench.timing import (
    CopyCeiling,
    MatrixCeiling,
    Stopwatch,
    interleave,
    medians,
    peak_memory,
    start_peak,
)
from bench.workers import Worker, WorkerError, serve
from metro_ext.command_line import run
from metro_ext.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64}
FORWARD, BOTH = "forward", "forward + backward"
CEILINGS = "ceilings"
COLD_BYTES = 128 << 20  # several times a last-level cache
MOST_COPIES = 64
# Of the matrix rate: a square product, and one as tall as a batch.
MATRIX_SHAPES = {
    "cpu": ((2048, 2048, 2048), (4096, 3072, 768)),
    "cuda": ((8192, 8192, 8192), (32768, 3072, 768)),
}


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
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (15)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before (3)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes: does everything run? times mean nothing"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave compiled peers out")
    parser.add_argument("--output", metavar="FILE", help="write the JSON too, to bench/results")
    for name in ("--worker", "--case", "--case-dtype"):
        parser.add_argument(name, help=argparse.SUPPRESS)
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

    def __init__(self, case: OpCase, contender: Contender, dtype: str, device: torch.device):
        self.case, self.device = case, device
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
        self.held: int | None = None

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

    def prepare(self, mode: str) -> float | None:
        """Runs twice, then begins the peak; returns the bytes of what a call gives back, in MB."""
        if mode == BOTH and self.grad_out is None:
            self.grad_out = torch.ones_like(self.forward()[0])
        call = self._call(mode)
        call()  # compiles, and fills whatever is kept between calls
        results = sum(t.numel() * t.element_size() for t in call() if isinstance(t, Tensor))
        self.held = start_peak(self.device)
        return results / 1e6

    def run(self, mode: str) -> float:
        return self.watch.time(self._call(mode))

    def peak(self) -> float | None:
        """MB of the highest moment since `prepare`, beyond what was held then."""
        return None if self.held is None else (peak_memory(self.device) - self.held) / 1e6

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
    """A worker's life: one contender of one case, or the ceilings."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.worker == CEILINGS:
        serve(_ceiling_methods(options, device))
        return
    case = next(c for c in all_cases(options.device, options.small) if c.name == options.case)
    bench: Bench

    def prepare(mode: str) -> float | None:
        nonlocal bench
        if mode == FORWARD:
            bench = Bench(case, case.contenders[options.worker], options.case_dtype, device)
        return bench.prepare(mode)

    serve(
        {
            "prepare": prepare,
            "run": lambda mode: bench.run(mode),
            "peak": lambda: bench.peak(),
        }
    )


def _ceiling_methods(options: argparse.Namespace, device: torch.device) -> dict[str, Callable]:
    copy = CopyCeiling(device)
    products = {
        f"linear {m}x{n}x{k} {dtype}": MatrixCeiling(m, n, k, DTYPES[dtype], device)
        for m, n, k in MATRIX_SHAPES[options.device]
        for dtype in options.dtype
    }
    contenders = {"copy": copy, **products}

    def measure(rounds: int, warmup: int) -> dict[str, float]:
        median = medians(interleave(contenders, rounds, warmup))
        rates = {f"{name} GFLOP/s": p.flops / median[name] / 1e9 for name, p in products.items()}
        return {"copy GB/s": copy.bytes / median["copy"] / 1e9, **rates}

    return {"measure": measure, "threads": torch.get_num_threads}


def measure_case(
    case: OpCase, dtype: str, options: argparse.Namespace, ceilings: dict[str, float]
) -> list[Case]:
    """All contenders of a case in turns: the forward pass, then both passes."""
    arguments = ["--case", case.name, "--case-dtype", dtype, "--device", options.device]
    arguments += ["--small"] if options.small else []
    arguments += ["--threads", str(options.threads)] if options.threads else []
    absent, workers, done = {}, {}, []
    with ExitStack() as stack:
        for name, contender in case.contenders.items():
            if contender.absent:
                absent[name] = ABSENT + contender.absent
            elif options.no_compile and name.startswith("compiled"):
                absent[name] = ABSENT + "left out by --no-compile"
            else:
                workers[name] = stack.enter_context(Worker("bench.ops", name, arguments))
        for mode in (FORWARD, BOTH) if case.gradients else (FORWARD,):
            results = _prepare(workers, absent, mode)
            times = interleave(
                {n: (lambda w=w, m=mode: w.call("run", mode=m)) for n, w in workers.items()},
                options.rounds,
                options.warmup,
            )
            peaks = {name: worker.call("peak") for name, worker in workers.items()}
            done.append(_result(case, dtype, mode, times, peaks, results, absent, ceilings))
    return done


def _prepare(workers: dict[str, Worker], absent: dict[str, str], mode: str) -> float:
    """Readies every worker; a peer that fails becomes absent. MB of our results."""
    results = workers["ours"].call("prepare", mode=mode)
    for name in [name for name in workers if name != "ours"]:
        try:
            workers[name].call("prepare", mode=mode)
        except WorkerError as error:
            absent[name] = ABSENT + str(error)
            workers.pop(name).close()
    return results


def _result(
    case: OpCase,
    dtype: str,
    mode: str,
    times: dict[str, list[float]],
    peaks: dict[str, float | None],
    results_mb: float,
    absent: dict[str, str],
    ceilings: dict[str, float],
) -> Case:
    median = medians(times)
    work = (case.both if mode == BOTH else case.forward)(DTYPES[dtype].itemsize)
    rates = [rate for name, rate in ceilings.items() if name.endswith(f" {dtype} GFLOP/s")]
    # An integer case has no products, and so no rate to be limited by.
    flops_per_s = max(rates) * 1e9 if rates else float("inf")
    peak = peaks["ours"]
    beyond = None if peak is None else peak - results_mb
    return Case(
        name=f"{case.name} {dtype} {mode}",
        ours=median["ours"],
        peers={name: value for name, value in median.items() if name != "ours"} | absent,
        lesser={
            name: contender.lesser
            for name, contender in case.contenders.items()
            if contender.lesser and name in median
        },
        floor_seconds=work.floor(ceilings["copy GB/s"] * 1e9, flops_per_s),
        peak_mb=peak,
        peers_peak_mb={n: mb for n, mb in peaks.items() if n != "ours" and mb is not None},
        spread={name: (min(values), max(values)) for name, values in times.items()},
        figures={
            "family": case.family,
            "results_mb": results_mb,
            "beyond_results_mb": beyond,
            "gb_per_s": work.bytes / median["ours"] / 1e9,
            "gflop_per_s": work.flops / median["ours"] / 1e9,
        },
    )


def measure(options: argparse.Namespace) -> tuple[list[Case], dict[str, float], int]:
    families = options.families or list(FAMILIES)
    cases = [c for c in all_cases(options.device, options.small) if c.family in families]
    dtype = options.dtype[0] if len(options.dtype) == 1 else "both"
    arguments = ["--device", options.device, "--dtype", dtype]
    arguments += ["--threads", str(options.threads)] if options.threads else []
    with Worker("bench.ops", CEILINGS, arguments) as worker:
        ceilings = worker.call("measure", rounds=options.rounds, warmup=options.warmup)
        threads = worker.call("threads")
    results = []
    for case in cases:
        for dtype in _dtypes(case, options.dtype):
            results += measure_case(case, dtype, options, ceilings)
            print(f"measured {case.name} {dtype}", file=sys.stderr, flush=True)
    return results, ceilings, threads


def _dtypes(case: OpCase, wanted: Iterable[str]) -> list[str]:
    """Those wanted that the case knows; the one that it has, where it knows neither."""
    return [dtype for dtype in case.dtypes if dtype in wanted] or list(case.dtypes)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.worker:
        work(options)
        return
    cases, ceilings, threads = measure(options)
    emit(
        "ops", cases, ceilings=ceilings, threads=threads, device=options.device,
        output=options.output,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
