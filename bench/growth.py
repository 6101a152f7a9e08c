"""How the time and memory of a training step grow with its size.

    python bench/growth.py [AXIS ...] [--precision bf16] [--output NAME]

One axis varies at a time around a small model. Every point is a process of its own, so that its
peak memory is its own; ``ours`` is the median time of a step. For each axis the record states the
exponent b of a least-squares fit  time = a · size^b  in logarithms, and the same exponent of the
step's useful FLOPs (`metro_ext.presets.flops_per_token`), of each thread, over the same sizes: what
theory says where matrix products are all there is. Peak memory stands beside what `metro_ext.plan`
expects of weights, gradients, moments and activations; both are fitted with their least value taken
off, as the process itself and much of the model are in every point. Writes NAME.json and NAME.png.
"""

import argparse
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python bench/growth.py`

from matplotlib.figure import Figure

from bench import step
from bench.harness import RESULTS, Case, emit
from bench.timing import interleave, medians
from bench.workers import Worker
from metro_ext.atomic import atomic_write
from metro_ext.command_line import run
from metro_ext.errors import UserError
from metro_ext.plan_memory import Layout, peak_memory
from metro_ext.presets import flops_per_token

BASE = {
    "layers": 4, "aux-layers": 2, "hidden": 256, "heads": 4,
    "vocab": 16384, "tokens": 4096, "seq": 128,
}  # fmt: skip
AXES: dict[str, tuple[int, ...]] = {
    "tokens": (1024, 4096, 16384, 65536),
    "seq": (128, 512, 2048, 4096),
    "vocab": (8192, 32768, 131072, 262144),
    "hidden": (128, 256, 512, 1024),
    "threads": (1, 2),
}
RECOMPUTE = "norms"  # the default of run.recompute


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/growth.py",
        description="Time and memory of a step against its size.",
        allow_abbrev=False,
    )
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"{', '.join(AXES)} (all)")
    parser.add_argument("--precision", choices=tuple(step.DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (3)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before (1)")
    parser.add_argument("--most", type=int, help="leave out sizes above this")
    parser.add_argument("--output", metavar="NAME", help="write NAME.json and NAME.png")
    options = parser.parse_args(argv)
    for axis in options.axes:
        if axis not in AXES:
            raise UserError(f"there is no axis {axis!r}; choose from {', '.join(AXES)}")
    if options.rounds < 1 or options.warmup < 0:
        raise UserError("--rounds must be at least 1 and --warmup at least 0")
    return options


def arguments(axis: str, size: int, precision: str) -> list[str]:
    """The command line of ``bench/step.py`` for a point; heads are 64 wide."""
    shape = {**BASE, axis: size}
    if axis == "hidden":
        shape["heads"] = size // 64
    words = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    return ["--peer", "none", "--precision", precision, *words]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The slope of ln value over ln size; None with fewer than two points above zero."""
    points = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True) if v > 0]
    if len(points) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    square = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / square


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """`exponent` of what each value has beyond the least."""
    least = min(values, default=0.0)
    return exponent(sizes, [value - least for value in values])


def measure_point(axis: str, size: int, options: argparse.Namespace) -> tuple[Case, float]:
    """A point and its useful FLOPs."""
    words = arguments(axis, size, options.precision)
    shape = step.parse(words)
    model, objective, _ = step.configs(shape)
    flops = shape.tokens * flops_per_token(model, objective)
    if axis == "threads":
        flops /= size
    layout = Layout("ddp", 1, RECOMPUTE, shape.tokens // shape.seq, 1)
    planned = peak_memory(model, objective, options.precision, layout, device="cpu").total / 1e6
    with Worker("bench.step", "ours", words) as worker:
        worker.call("prepare")
        times = interleave({"ours": lambda: worker.call("step")}, options.rounds, options.warmup)
        peak = worker.call("peak") / 1e6
    case = Case(
        name=f"{axis} {size}",
        ours=medians(times)["ours"],
        peak_mb=peak,
        spread={"ours": (min(times["ours"]), max(times["ours"]))},
        figures={
            "axis": axis, "size": size, "gflop_of_a_thread": flops / 1e9, "planned_mb": planned,
        },
    )  # fmt: skip
    return case, flops


def measure(options: argparse.Namespace) -> list[Case]:
    cases = []
    for axis in options.axes or list(AXES):
        sizes = [size for size in AXES[axis] if not options.most or size <= options.most]
        points = [measure_point(axis, size, options) for size in sizes]
        for case, _ in points:
            print(f"measured {case.name}", file=sys.stderr, flush=True)
        fits = {
            "time_exponent": exponent(sizes, [case.ours for case, _ in points]),
            "flops_exponent": exponent(sizes, [flops for _, flops in points]),
            "memory_exponent": growth_exponent(sizes, [case.peak_mb for case, _ in points]),
            "planned_exponent": growth_exponent(
                sizes, [case.figures["planned_mb"] for case, _ in points]
            ),
        }
        for case, _ in points:
            case.figures.update(fits)
            cases.append(case)
    return cases


def plot(cases: Sequence[Case], path: Path) -> None:
    """Time (left) and peak memory (right), a row an axis, logarithmic."""
    axes = list(dict.fromkeys(case.figures["axis"] for case in cases))
    figure = Figure(figsize=(9, 2.8 * len(axes)), layout="constrained")
    grid = figure.subplots(len(axes), 2, squeeze=False)
    for row, axis in zip(grid, axes, strict=True):
        points = [case for case in cases if case.figures["axis"] == axis]
        sizes = [case.figures["size"] for case in points]
        fit, theory = (points[0].figures[f"{key}_exponent"] for key in ("time", "flops"))
        label = "" if fit is None else f"measured: size^{fit:.2f}"
        row[0].loglog(sizes, [case.ours for case in points], "o-", color="#0072B2", label=label)
        if theory is not None:
            flops = [case.figures["gflop_of_a_thread"] for case in points]
            scaled = [points[-1].ours * value / flops[-1] for value in flops]
            row[0].loglog(sizes, scaled, "--", color="#666666", label=f"FLOPs: size^{theory:.2f}")
        row[0].legend(frameon=False)
        row[0].set_ylabel("s a step")
        row[1].loglog(sizes, [c.peak_mb for c in points], "o-", color="#D55E00", label="measured")
        planned = [case.figures["planned_mb"] for case in points]
        row[1].loglog(sizes, planned, "--", color="#666666", label="planned, without the process")
        row[1].legend(frameon=False)
        row[1].set_ylabel("peak MB")
        for panel in row:
            panel.set_xlabel(axis)
            panel.set_xticks(sizes, [f"{s // 1024}K" if s % 1024 == 0 else str(s) for s in sizes])
            panel.minorticks_off()
            low, high = panel.get_ylim()
            marks = [m * 10**e for e in range(-3, 6) for m in (1, 2, 3, 5)]
            marks = [mark for mark in marks if low <= mark <= high]
            panel.set_yticks(marks, [f"{mark:g}" for mark in marks])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with atomic_write(path, "wb") as file:
        file.write(buffer.getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    cases = measure(options)
    emit("growth", cases, output=options.output and f"{options.output}.json")
    if options.output:
        plot(cases, RESULTS / f"{options.output}.png")


if __name__ == "__main__":
    run(main)
