"""Every operator beside its peers and its floor.

    python bench/ops.py [FAMILY ...] [--dtype bf16] [--modes forward backward both]
        [--output FILE.json]

Each case is timed forward (without gradient) and, where it has a gradient, backward alone and
forward and backward together. Backward alone is ``torch.autograd.grad`` from the gradient of the
output to that of every input that has one: autograd's own work and the memory of the gradients are
part of it, the forward pass that it needs runs before it, untimed and anew for each call, as a
backward pass frees what it has read. The vocabulary head has none: its gradients come from the
forward pass.

Inputs come from memory and not from a cache, as in a training step: on the CPU, calls take turns
over copies of them that no cache holds together (a backward pass belongs to a forward pass that
long ago); on CUDA the cache is overwritten before each call. Each contender of a family is a
process of its own, which keeps the memory that it frees, as `metro_ext.train` does: an output that
the system maps and zeroes anew at every call costs more than most kernels (``--fresh-memory`` shows
it). On CUDA it gives back what it keeps after each call, where that is much, and a call that is not
timed fetches it again: otherwise the contenders would have to fit into the device's memory all at
once. ``peak_mb`` is what a call needs at its peak beyond what was held before it: outputs and
gradients (``results_mb``, which no implementation can do without) and whatever is temporary.
Floors: bytes over the copy bandwidth or FLOPs over the rate of torch's own product, whichever is
the longer, both measured in turns with the contenders. That of the forward pass is of a training
step: what LayerNorm writes for its backward pass is in it, though nothing else needs it. On the CPU
an output of a few MB may stay in the cache, and a share can then pass 100 %. A peer that fails, for
want of memory say, leaves the case with its error as the reason.

A family is measured in about a minute; each may have a file of its own, as in
``python bench/ops.py attention --output ops-attention.json``.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/ops.py`

from bench.cases import FAMILIES
from bench.cases.common import BACKWARD, BOTH, FORWARD, OpCase
from bench.ceilings import Ceilings, worker_methods
from bench.harness import ABSENT, Case, emit, print_record, record_of
from bench.op_worker import DTYPES, serve_contender
from bench.timing import Work, interleave, medians
from bench.workers import Crew, Worker, serve
from metro_ext.command_line import run
from metro_ext.errors import UserError

MODES = {"forward": FORWARD, "backward": BACKWARD, "both": BOTH}
OURS, CEILINGS = "ours", "ceilings"
PAUSE_SECONDS = 0.02
Measured = dict[str, Any]  # the keywords of `bench.harness.emit`


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/ops.py",
        description="Time every operator beside its peers and its floor.",
        allow_abbrev=False,
    )
    names = ", ".join(FAMILIES)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{names} (default: all)")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "both"), default="both")
    parser.add_argument(
        "--modes", nargs="+", choices=tuple(MODES), default=list(MODES), help="(all of them)"
    )
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
    parser.add_argument(
        "--running-record", action="store_true",
        help="print the record after every case: what is left of a run that is cut off",
    )  # fmt: skip
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.modes = [MODES[name] for name in options.modes]
    options.dtype = ["bf16", "fp32"] if options.dtype == "both" else [options.dtype]
    for family in options.families:
        if family not in FAMILIES:
            raise UserError(f"there is no operator family {family!r}; choose from {names}")
    if options.rounds < 1 or options.warmup < 0:
        raise UserError("--rounds must be at least 1 and --warmup at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no CUDA device; use --device cpu")
    return options


def work(options: argparse.Namespace) -> None:
    """A worker's life: one contender of a family, or the ceilings."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker != CEILINGS:
        return serve_contender(options)
    device = torch.device(options.device)
    serve(worker_methods(device, {name: DTYPES[name] for name in options.dtype}))


def measure_case(
    case: OpCase, dtype: str, crew: Crew, options: argparse.Namespace, ceilings: Ceilings
) -> list[Case]:
    """All contenders of a case in turns, a mode after the other."""
    reasons = {name: _why_not(case, name, options) for name in case.contenders}
    left_out = {name: ABSENT + why for name, why in reasons.items() if why}
    crew.muster(name for name in case.contenders if name not in left_out)
    for name in crew.present:
        crew.attempt(name, "build", case=case.name, dtype=dtype)
    done = []
    for mode in (mode for mode in case.modes if mode in options.modes):
        work = case.work(mode, DTYPES[dtype].itemsize)
        ready = {name: crew.attempt(name, "prepare", mode=mode) for name in crew.present}
        times = interleave(
            {name: (lambda n=name, m=mode: crew.call(n, "run", mode=m)) for name in crew.present}
            | ceilings.beside(work, dtype),
            options.rounds,
            options.warmup,
            pause=_pause(options),
            seconds=options.seconds,
            drop=crew.drop,
        )
        floor, rates = ceilings.floor(work, dtype, medians(times))
        done.append(
            _result(
                case,
                mode,
                f"{case.name} {dtype} {mode}",
                times={name: times[name] for name in crew.present},
                peaks={name: ready[name][1] for name in crew.present},
                absent=left_out | {name: ABSENT + why for name, why in crew.absent.items()},
                floor=floor,
                figures={**_rates(case, mode, work, medians(times)[OURS]), **rates},
                results_mb=ready[OURS][0],
            )
        )
    return done


def _pause(options: argparse.Namespace) -> float:
    return PAUSE_SECONDS if options.device == "cpu" else 0.0


def _why_not(case: OpCase, name: str, options: argparse.Namespace) -> str:
    """Why a contender takes no part in the case; empty if it does."""
    compiled = name.startswith("compiled")
    left_out = "left out by --no-compile" if compiled and options.no_compile else ""
    return case.contenders[name].absent or left_out


def _rates(case: OpCase, mode: str, work: Work, seconds: float) -> dict[str, float]:
    """Of the least work, and with the products that flash attention's published rates count too."""
    rates = {
        "gb_per_s": work.bytes / seconds / 1e9,
        "gflop_per_s": work.flops / seconds / 1e9,
    }
    if case.recomputed and mode != FORWARD:
        rates["flash_gflop_per_s"] = (work.flops + case.recomputed) / seconds / 1e9
    return rates


def _result(
    case: OpCase,
    mode: str,
    name: str,
    *,
    times: dict[str, list[float]],
    peaks: dict[str, float | None],
    absent: dict[str, str],
    floor: float,
    figures: dict[str, float],
    results_mb: float,
) -> Case:
    median = medians(times)
    peak = peaks[OURS]
    beyond = None if peak is None else peak - results_mb
    return Case(
        name=name,
        ours=median[OURS],
        peers={name: value for name, value in median.items() if name != OURS} | absent,
        lesser={
            name: contender.lesser
            for name, contender in case.contenders.items()
            if contender.lesser and name in median
        },
        floor_seconds=floor,
        peak_mb=peak,
        peers_peak_mb={n: mb for n, mb in peaks.items() if n != OURS and mb is not None},
        spread={name: (min(values), max(values)) for name, values in times.items()},
        figures={
            "family": case.family,
            "mode": mode,
            "rounds": len(times[OURS]),
            "results_mb": results_mb,
            "beyond_results_mb": beyond,
            **figures,
        },
    )


def measure(options: argparse.Namespace, argv: Sequence[str]) -> Iterator[Measured]:
    """The cases so far with the ceilings and the number of threads: after each, and at the end."""
    done: list[Case] = []
    with Worker("bench.ops", CEILINGS, argv) as worker:
        ceilings = Ceilings(worker, options.rounds, options.warmup, _pause(options))
        threads = worker.call("threads")
        for family in options.families or list(FAMILIES):
            with Crew("bench.ops", argv, needed=[OURS]) as crew:
                for case in FAMILIES[family].cases(options.device, options.small):
                    for dtype in _dtypes(case, options.dtype):
                        done += measure_case(case, dtype, crew, options, ceilings)
                        print(f"measured {case.name} {dtype}", file=sys.stderr, flush=True)
                        yield {"cases": done, "ceilings": ceilings.rates, "threads": threads}


def _dtypes(case: OpCase, wanted: Iterable[str]) -> list[str]:
    """Those wanted that the case knows; the one that it has, where it knows neither."""
    return [dtype for dtype in case.dtypes if dtype in wanted] or list(case.dtypes)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if options.worker:
        work(options)
        return
    for measured in measure(options, argv):
        if options.running_record:
            print_record(record_of("ops", **measured, device=options.device))
    emit("ops", **measured, device=options.device, output=options.output)


if __name__ == "__main__":
    run(main)
