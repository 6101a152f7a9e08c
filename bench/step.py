"""The whole METRO training step beside the same model from another library.

    python bench/step.py --peer hf --precision bf16 [--output FILE.json]

One step: zero the gradients, corrupt, forward, backward, clip, AdamW. The batches are random tokens
in sequences of equal length, so that the peer, which knows no packing, computes nothing in vain.
Every contender lives in its own process and takes its turn; ``peak_mb`` is the peak resident memory
of that process over its whole life (on CUDA: the peak of torch's allocations). With ``bf16`` the
peer runs both by autocast and by bfloat16 weights beside float32 masters; the ratio is to the
fastest. On CUDA our step also runs in a CUDA graph; its time is among the case's figures.

On CUDA the contenders share one memory. A turn is two steps that are not timed and one that is;
after it the contender gives back all but its weights and optimizer state, so that only one at a
time holds what a step needs. A peer that fails all the same, for want of memory say, leaves the
turns, and the table has its error in place of a time.

The floor is the useful work in matrix products (`metro_ext.presets.flops_per_token`) over the best
rate of torch's kernels that this run measured, among a large shape and the step's own shapes.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/step.py`

from bench.harness import ABSENT, Case, emit, print_record, record_of
from bench.peers.sampling import SAMPLING
from bench.step_worker import DTYPES, GRAPHED, OURS, configs, serve_contender
from bench.timing import MatrixCeiling, interleave, medians
from bench.workers import Crew, Worker, serve
from metro_ext.command_line import run
from metro_ext.config_schema import ObjectiveConfig, RunConfig
from metro_ext.cuda_graph import wanted
from metro_ext.errors import UserError
from metro_ext.hardware import peak_flops
from metro_ext.objective import mask_count
from metro_ext.presets import flops_per_token

CEILINGS = "ceilings"


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
    parser.add_argument(
        "--running-record", action="store_true",
        help="time and print ours alone first: what is left of a run that is cut off",
    )  # fmt: skip
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


def work(options: argparse.Namespace) -> None:
    """A worker's life: one contender, or the matrix products that make the ceiling."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker != CEILINGS:
        return serve_contender(options)
    serve(_ceiling_methods(options, torch.device(options.device)))


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


Measured = dict[str, Any]  # the keywords of `bench.harness.emit`


def measure(options: argparse.Namespace, argv: Sequence[str]) -> Iterator[Measured]:
    """The case with the measured ceilings and the number of threads; with ``--running-record``
    that of ours alone before."""
    names = [*own_names(options), *peer_names(options)]
    with Worker("bench.step", CEILINGS, argv) as ceilings, Crew("bench.step", argv, [OURS]) as crew:
        crew.muster(names)
        first_seconds = {OURS: crew.call(OURS, "prepare")}
        if options.running_record:
            yield _measure_present(options, crew, [OURS], ceilings, first_seconds)
        for name in names[1:]:
            seconds = crew.attempt(name, "prepare")
            if seconds is not None:
                first_seconds[name] = seconds
        yield _measure_present(options, crew, list(crew.present), ceilings, first_seconds)


def _measure_present(
    options: argparse.Namespace,
    crew: Crew,
    names: Sequence[str],
    ceilings: Worker,
    first_seconds: Mapping[str, float],
) -> Measured:
    """These contenders and the products of the ceiling in turns."""
    products = ceilings.call("names")
    turns = {name: (lambda n=name: crew.call(n, "step")) for name in names} | {
        name: (lambda n=name: ceilings.call("measure", name=n)) for name in products
    }
    times = interleave(turns, options.steps, options.warmup, drop=crew.drop)
    median = medians(times)
    rates = {name: ceilings.call("flops", name=name) / median[name] for name in products}
    contenders = {name: times[name] for name in names if name in times}
    asked = {
        what: {name: crew.call(name, what) for name in contenders} for what in ("peak", "losses")
    }
    case = _case(
        options, contenders, floor_rate=max(rates.values()), absent=crew.absent,
        peaks={name: peak / 1e6 for name, peak in asked["peak"].items()},
        figures={"first_step_seconds": dict(first_seconds), "first_and_last_loss": asked["losses"]},
    )  # fmt: skip
    named = {f"{name} GFLOP/s": rate / 1e9 for name, rate in rates.items()}
    return {"cases": [case], "ceilings": named, "threads": ceilings.call("threads")}


def _case(
    options: argparse.Namespace,
    times: Mapping[str, list[float]],
    *,
    floor_rate: float,
    absent: Mapping[str, str],
    peaks: dict[str, float],
    figures: Mapping[str, Any],
) -> Case:
    model_config, objective_config, _ = configs(options)
    flops = options.tokens * flops_per_token(model_config, objective_config)
    median = medians(times)
    missing = {name: ABSENT + why for name, why in absent.items()}
    graphed = median.get(GRAPHED, missing.pop(GRAPHED, None))
    return Case(
        name=f"step {options.layers}x{options.hidden} aux {options.aux_layers}x{options.hidden} "
        f"vocabulary {options.vocab} tokens {options.tokens // options.seq}x{options.seq} "
        f"{options.precision} {options.device}",
        ours=median[OURS],
        peers={name: median[name] for name in times if name not in (OURS, GRAPHED)} | missing,
        floor_seconds=flops / floor_rate,
        peak_mb=peaks.pop(OURS),
        peers_peak_mb=peaks,
        spread={name: (min(values), max(values)) for name, values in times.items()},
        figures={
            "tokens_per_s": {name: options.tokens / seconds for name, seconds in median.items()},
            "gflop": flops / 1e9,
            **({} if graphed is None else {"ours_graphed_seconds": graphed}),
            **_utilisation(options, flops, median),
            "masked": mask_count(options.tokens, objective_config.mask_fraction),
            **figures,
            "peer_sampling": options.sampling,
            "ours_compiled": options.compile_ours,
            "rounds": options.steps,
        },
    )


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
    for measured in measure(options, argv):
        if options.running_record:
            print_record(record_of("step", **measured, device=options.device))
    emit("step", **measured, device=options.device, output=options.output)


if __name__ == "__main__":
    run(main)
