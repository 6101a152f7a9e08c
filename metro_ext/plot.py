"""A picture of a run: `python -m metro_ext.plot RUN` writes RUN/training.png from its records."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, PercentFormatter

from metro_ext import command_line
from metro_ext.atomic import atomic_write
from metro_ext.errors import UserError
from metro_ext.monitor import EVALUATION_FILE, METRICS_FILE, TIMING_FILE, read_records

IMAGE_FILE = "training.png"

# Okabe and Ito's palette: told apart by colour-blind readers too. A quantity keeps its colour.
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_GREY = "#666666"


@dataclass(frozen=True)
class _Series:
    """One curve: where its numbers stand and how it is drawn."""

    file: str
    key: str
    label: str
    color: str
    style: str = "-"


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    series: tuple[_Series, ...]
    format: Callable[[Axes], None] | None = None


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=1))


def _thousands(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylim(0.0, 1.15 * axes.dataLim.ymax)


_PANELS = (
    _Panel(
        "Vocabulary losses",
        "nats per predicted token",
        (
            _Series(METRICS_FILE, "mlm_loss", "masked tokens (MLM), training", _BLUE),
            _Series(METRICS_FILE, "clm_loss", "corrective (CLM), training", _ORANGE),
            _Series(EVALUATION_FILE, "clm_loss", "corrective (CLM), held-out", _ORANGE, "o--"),
        ),
    ),
    _Panel(
        "Held-out masked-token loss",
        "nats per masked token",
        (
            _Series(EVALUATION_FILE, "mlm_loss", "this model", _BLUE, "o-"),
            _Series(EVALUATION_FILE, "unigram_loss", "token frequencies alone", _GREY, "level"),
        ),
    ),
    _Panel(
        "Replaced token detection: loss",
        "nats per token",
        (
            _Series(METRICS_FILE, "rtd_loss", "training", _GREEN),
            _Series(EVALUATION_FILE, "rtd_loss", "held-out", _GREEN, "o--"),
        ),
    ),
    _Panel(
        "Replaced token detection: accuracy",
        "share of tokens",
        (
            _Series(METRICS_FILE, "rtd_accuracy", "training", _GREEN),
            _Series(EVALUATION_FILE, "rtd_accuracy", "held-out", _GREEN, "o--"),
            _Series(EVALUATION_FILE, "rtd_majority", 'always "original", held-out', _GREY, ":"),
        ),
        _percent,
    ),
    _Panel(
        "Replaced token detection, held-out",
        "share (AUC of chance: 50%)",
        (
            _Series(EVALUATION_FILE, "rtd_auc", "AUC", _RED, "o-"),
            _Series(EVALUATION_FILE, "rtd_f1", 'F1 of "replaced"', _PURPLE, "o-"),
        ),
        _percent,
    ),
    _Panel(
        "Throughput",
        "tokens per second",
        (_Series(TIMING_FILE, "tokens_per_s", "", _ORANGE),),
        _thousands,
    ),
)


def plot_run(run_dir: str | Path) -> Path:
    """Draws `run_figure` into `run_dir/training.png` and returns that path."""
    image = io.BytesIO()
    run_figure(run_dir).savefig(image, format="png")
    path = Path(run_dir) / IMAGE_FILE
    with atomic_write(path, "wb") as file:
        file.write(image.getvalue())
    return path


def run_figure(run_dir: str | Path) -> Figure:
    """A run's losses, detection figures and throughput against its steps.

    Panels without data (an objective without RTD, no evaluation yet) are left out. Raises
    UserError where the folder has no records.
    """
    run_dir = Path(run_dir)
    files = (METRICS_FILE, EVALUATION_FILE, TIMING_FILE)
    records = {name: read_records(run_dir / name) for name in files}
    drawn = [(panel, curves) for panel in _PANELS if (curves := _curves(panel, records))]
    if not drawn:
        raise UserError(
            f"expected the folder of a run with records in {METRICS_FILE}, found none in {run_dir}"
        )
    columns = 2 if len(drawn) in (2, 4) else min(len(drawn), 3)
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(
        figsize=(5.0 * columns, 3.8 * rows),
        dpi=120,
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
    figure.suptitle(f"Run {run_dir.resolve().name}", fontsize=13, fontweight="bold")
    for place, (panel, curves) in enumerate(drawn, 1):
        _draw(figure.add_subplot(rows, columns, place), panel, curves)
    return figure


def _curves(
    panel: _Panel, records: dict[str, list[dict[str, Any]]]
) -> list[tuple[_Series, list[int], list[float]]]:
    """The panel's series that have numbers. A curve breaks where a value is NaN or infinite."""
    found = []
    for series in panel.series:
        present = [r for r in records[series.file] if r.get(series.key) is not None]
        values = [float(record[series.key]) for record in present]
        values = [value if math.isfinite(value) else math.nan for value in values]
        if not all(math.isnan(value) for value in values):
            found.append((series, [record["step"] for record in present], values))
    return found


def _draw(axes: Axes, panel: _Panel, curves: list[tuple[_Series, list[int], list[float]]]) -> None:
    for series, steps, values in curves:
        if series.style == "level":
            axes.axhline(values[-1], color=series.color, linestyle="--", label=series.label)
            continue
        style = series.style
        if len(steps) == 1 and "o" not in style:
            style = "o"  # a line through one point cannot be seen
        axes.plot(
            steps, values, style, color=series.color, label=series.label, linewidth=1.6,
            markersize=4,
        )  # fmt: skip
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.format is not None:
        panel.format(axes)
    if any(series.label for series, _, _ in curves):
        axes.legend(fontsize=8, frameon=False)


def _main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("expected the folder of one run: python -m metro_ext.plot RUN")
    print(plot_run(sys.argv[1]))


if __name__ == "__main__":
    command_line.run(_main)
