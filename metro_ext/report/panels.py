"""What a report draws: panels of curves, read from the records of runs."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from metro_ext.monitor import EVALUATION_FILE, METRICS_FILE, TIMING_FILE
from metro_ext.report.runs import Run, number

MOST_POINTS = 400  # of a curve: more than a screen has columns for it

Value = tuple[int, float | None]  # by step; None is no finite number

SOLID, DASHED, DOTTED = "solid", "dashed", "dotted"


@dataclass(frozen=True)
class Series:
    """One curve of every run: where its numbers stand, its name, its kind of line.

    level: the last value alone counts and is drawn from end to end.
    """

    file: str
    key: str
    label: str
    style: str = SOLID
    level: bool = False


@dataclass(frozen=True)
class Panel:
    """unit: of the values, "%" for shares; logarithmic: of the vertical axis."""

    title: str
    unit: str
    series: tuple[Series, ...]
    logarithmic: bool = False


class Curve(NamedTuple):
    """A series of the run of that number.

    points: by step; of a long series the means of stretches.
    gaps: where it breaks, as indices of the points before which there were values that are no
        finite numbers.
    extremes: what no mean may hide: the lowest and highest values of these stretches, the first
        and the last; the points themselves where they are few.
    """

    run: int
    series: Series
    points: list[tuple[int, float]]
    gaps: frozenset[int]
    extremes: list[tuple[int, float]]

    @property
    def is_long(self) -> bool:
        return self.points != self.extremes


def _both(key: str) -> tuple[Series, Series]:
    return (
        Series(METRICS_FILE, key, "training"),
        Series(EVALUATION_FILE, key, "held-out", DASHED),
    )


PANELS = (
    Panel(
        "Masked-token loss (MLM)",
        "nats a masked token",
        (
            *_both("mlm_loss"),
            Series(EVALUATION_FILE, "unigram_loss", "token frequencies alone", DOTTED, level=True),
        ),
    ),
    Panel("Corrective loss (CLM)", "nats a predicted token", _both("clm_loss")),
    Panel("Corrective accuracy (CLM)", "%", _both("clm_accuracy")),
    Panel("Replaced token detection: loss", "nats a token", _both("rtd_loss")),
    Panel(
        "Replaced token detection: accuracy",
        "%",
        (
            *_both("rtd_accuracy"),
            Series(EVALUATION_FILE, "rtd_majority", 'always "original"', DOTTED),
        ),
    ),
    Panel(
        "Replaced token detection, held-out",
        "%",
        (
            Series(EVALUATION_FILE, "rtd_auc", "AUC (chance: 50 %)"),
            Series(EVALUATION_FILE, "rtd_f1", 'F1 of "replaced"', DASHED),
        ),
    ),
    Panel("Samples equal to the original", "%", _both("sample_accuracy")),
    Panel("Surprise of the samples", "nats a sample", _both("sample_nats")),
    Panel("Weighted loss", "nats", (Series(METRICS_FILE, "loss", "training"),)),
    Panel("Learning rate", "", (Series(METRICS_FILE, "lr", "learning rate"),)),
    Panel(
        "Gradient norm",
        "before clipping, logarithmic",
        (
            Series(METRICS_FILE, "grad_norm", "all"),
            Series(METRICS_FILE, "grad_norm_auxiliary", "auxiliary model", DASHED),
            Series(METRICS_FILE, "grad_norm_main", "main model", DOTTED),
        ),
        logarithmic=True,
    ),
    Panel("Throughput", "tokens a second", (Series(TIMING_FILE, "tokens_per_s", "training"),)),
    Panel("Memory, most so far", "MB", (Series(TIMING_FILE, "peak_mb", "training"),)),
    Panel("Waiting for data", "% of the time", (Series(TIMING_FILE, "data_wait", "training"),)),
    Panel(
        "Sampling temperature",
        "",
        (Series(METRICS_FILE, "sampling_temperature", "of the auxiliary model's samples"),),
    ),
    Panel("Weight of the MLM loss", "", (Series(METRICS_FILE, "mlm_weight", "MLM weight"),)),
)


def curves(panel: Panel, runs: list[Run]) -> list[Curve]:
    """The panel's series that have numbers, run by run."""
    found = []
    for place, run in enumerate(runs):
        for series in panel.series:
            values = [
                (record["step"], number(record[series.key]))
                for record in run.records[series.file]
                if record.get(series.key) is not None
            ]
            curve = _curve(place, series, values, positive=panel.logarithmic)
            if curve.points:
                found.append(curve)
    return found


def _curve(run: int, series: Series, values: list[Value], positive: bool) -> Curve:
    if positive:
        values = [
            (step, value if value is not None and value > 0 else None) for step, value in values
        ]
    if series.level:
        values = [one for one in values if one[1] is not None][-1:]
    extremes = [(step, value) for step, value in thinned(values) if value is not None]
    drawn = values if len(values) <= MOST_POINTS else means(values)
    points: list[tuple[int, float]] = []
    gaps = set()
    for step, value in drawn:
        if value is None:
            gaps.add(len(points))
        else:
            points.append((step, value))
    return Curve(run, series, points, frozenset(gaps), extremes)


def thinned(values: list[Value]) -> list[Value]:
    """At most `MOST_POINTS` values: of equal stretches the lowest and the highest, in their order.

    No spike is lost; the first and the last value stay, and so does a value of None, which stands
    for its whole stretch.
    """
    if len(values) <= MOST_POINTS:
        return values
    kept = {0, len(values) - 1}
    for inside in _stretches(len(values)):
        missing = [i for i in inside if values[i][1] is None]
        if missing:
            kept.add(missing[0])
            continue
        ranked = [(value, i) for i in inside if (value := values[i][1]) is not None]
        kept |= {min(ranked)[1], max(ranked, key=lambda one: one[0])[1]}  # of equals the first
    return [values[i] for i in sorted(kept)]


def means(values: list[Value]) -> list[Value]:
    """The means of the same stretches, at their last steps; None where a value is None."""
    found: list[Value] = []
    for inside in _stretches(len(values)):
        numbers = [value for i in inside if (value := values[i][1]) is not None]
        mean = math.fsum(numbers) / len(numbers) if len(numbers) == len(inside) else None
        found.append((values[inside[-1]][0], mean))
    return found


def _stretches(count: int) -> list[range]:
    number = (MOST_POINTS - 2) // 2
    return [range(count * i // number, count * (i + 1) // number) for i in range(number)]
