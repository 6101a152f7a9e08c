"""A run's progress as a panel on a terminal, drawn by rich (`pip install rich`)."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from metro_ext.progress import Numbers, duration, percent, scientific, short, thousands

# Between two drawings: each takes a few milliseconds, from the thread that trains.
REDRAW_SECONDS = 0.5
CURVE_WIDTH = 32
CURVE_POINTS = 8 * CURVE_WIDTH  # kept of a curve; even
_LEVELS = "▁▂▃▄▅▆▇█"

# (label, key, form); what an objective does not have gets no row. A key stands for the same thing
# in training metrics and in evaluations.
ROWS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("loss, weighted", "loss", short),
    ("MLM loss", "mlm_loss", short),
    ("  by token frequencies alone", "unigram_loss", short),
    ("RTD loss", "rtd_loss", short),
    ("CLM loss", "clm_loss", short),
    ("RTD accuracy", "rtd_accuracy", percent),
    ('  by always saying "original"', "rtd_majority", percent),
    ("RTD AUC", "rtd_auc", short),
    ("sampled right", "sample_accuracy", percent),
    ("gradient norm", "grad_norm", short),
)


class _Console(Console):
    """Leaves the cursor alone: a run that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


def terminal(stream: TextIO) -> Console | None:
    """A console on a stream that can show a panel, or None (TERM=dumb, say)."""
    console = _Console(file=stream)
    return console if console.is_terminal and not console.is_dumb_terminal else None


class Curve:
    """The course of a number, in constant memory: its points are means of equally many values."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._values: list[float] = []  # of the point to come
        self._stride = 1  # values to a point

    def add(self, value: float) -> None:
        self._values.append(value)
        if len(self._values) < self._stride:
            return
        self._points.append(sum(self._values) / self._stride)
        self._values.clear()
        if len(self._points) == CURVE_POINTS:
            halves = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(a + b) / 2 for a, b in halves]
            self._stride *= 2

    def text(self, width: int) -> str:
        """At most `width` characters, each a stretch's mean, scaled from lowest to highest."""
        points, count = self._points, min(len(self._points), width)
        if count < 2:
            return ""
        edges = [len(points) * i // count for i in range(count + 1)]
        means = [sum(points[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        low, high = min(means), max(means)
        scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
        return "".join(_LEVELS[round((mean - low) * scale)] for mean in means)


class Panelled:
    """The panel, at the bottom of the terminal; warnings and what others print go above it.

    console: a terminal (`terminal`).
    title: of the panel.
    total: steps of the whole run; step: those that are already taken.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        step: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._title, self._total, self._step = title, total, step
        self._clock, self._drawn = clock, -math.inf
        self._now: dict[str, float | None] = {}
        self._timing: Numbers = {}
        self._held_out: dict[str, float | None] = {}
        self._held_out_step: int | None = None
        self._curves = {key: Curve() for _, key, _ in ROWS}
        self._eta: float | None = None
        # Without rich's own thread: a drawing takes place between two steps. What goes to a file
        # instead of the terminal stays there.
        self._live = Live(
            console=console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def interval(self, step: int, values: Numbers, timing: Numbers, eta: float) -> None:
        self._step, self._now, self._timing, self._eta = step, dict(values), timing, eta
        for key, curve in self._curves.items():
            if (value := values.get(key)) is not None and math.isfinite(value):
                curve.add(value)
        self._draw()

    def evaluation(self, step: int, values: Numbers) -> None:
        self._held_out, self._held_out_step = dict(values), step
        self._draw()

    def tick(self, step: int) -> None:
        self._step = step
        if self._clock() - self._drawn >= REDRAW_SECONDS:
            self._draw()

    def warn(self, sentence: str) -> None:
        if sys.stderr.isatty():
            self._live.console.print(Text(f"warning: {sentence}", style="yellow"))
        else:
            print(f"warning: {sentence}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the last state of the panel on the terminal."""
        if self._live.is_started:
            self._draw()
            self._live.stop()

    def _draw(self) -> None:
        self._drawn = self._clock()
        self._live.start()  # at the first drawing, lest a run that is refused leaves an empty panel
        self._live.update(self.picture(), refresh=True)

    def picture(self) -> RenderableType:
        """The panel as it stands."""
        parts = [self._bar(), Text(), self._figures(), Text(), self._footer()]
        return Panel(
            Group(*parts), title=Text(self._title), title_align="left", border_style="cyan"
        )

    def _bar(self) -> RenderableType:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(ratio=1)
        table.add_column(justify="right", no_wrap=True)
        left = "" if self._eta is None else f"   {duration(self._eta)} left"
        share = f"{self._step}/{self._total}   {self._step / max(self._total, 1):.1%}{left}"
        table.add_row(ProgressBar(total=max(self._total, 1), completed=self._step), share)
        return table

    def _figures(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        at = "" if self._held_out_step is None else f" at {self._held_out_step}"
        table.add_column(no_wrap=True)
        for name in ("training", f"held-out{at}"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("course of training", no_wrap=True, overflow="crop")
        for label, key, form in ROWS:
            now, held_out = self._now.get(key), self._held_out.get(key)
            if now is None and held_out is None:
                continue
            style = "dim" if label.startswith(" ") else ""
            cells = ("" if value is None else form(value) for value in (now, held_out))
            table.add_row(
                label, *cells, Text(self._curves[key].text(CURVE_WIDTH), "cyan"), style=style
            )
        if not table.rows:
            return Text("the first figures come with the first interval", style="dim")
        return table

    def _footer(self) -> RenderableType:
        rate = self._timing.get("tokens_per_s")
        wait = self._timing.get("data_wait")
        parts = [
            f"{'-' if rate is None else thousands(rate)} tokens/s",
            f"MFU {percent(self._timing.get('mfu'))}",
            f"waiting for data {percent(wait)}",
            f"learning rate {scientific(self._now.get('lr'))}",
        ]
        if (peak := self._timing.get("peak_mb")) is not None:
            parts.append(f"memory {peak:,.0f} MB")
        if skipped := self._now.get("skipped_steps"):
            parts.append(f"[bold red]skipped steps {skipped:g}[/]")
        return Text.from_markup("   ".join(parts), style="dim")
