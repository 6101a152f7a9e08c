"""How a run's progress is shown: plain lines, and the form of its numbers.

On a terminal `metro_ext.progress_live` draws a panel instead; `metro_ext.monitor` chooses.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

Numbers = Mapping[str, Any]


class Progress(Protocol):
    """Shows what `metro_ext.monitor.Monitor` is told; nothing of it is kept."""

    def interval(self, step: int, values: Numbers, timing: Numbers, eta: float) -> None:
        """Training metrics (`values`) and speed (`timing`) up to step; eta: seconds to the end."""

    def evaluation(self, step: int, values: Numbers) -> None:
        """Metrics on held-out text."""

    def tick(self, step: int) -> None:
        """A step was taken."""

    def warn(self, sentence: str) -> None: ...

    def close(self) -> None: ...


class Lines:
    """A line an interval, for logs and pipes.

    stream: where the lines go; warnings go to the standard error.
    total: steps of the whole run.
    """

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream, self._total = stream, total

    def interval(self, step: int, values: Numbers, timing: Numbers, eta: float) -> None:
        self._print(interval_line(step, self._total, values, timing, eta))

    def evaluation(self, step: int, values: Numbers) -> None:
        shown = (f"{key.replace('_', ' ')} {short(value)}" for key, value in values.items())
        self._print("  ".join([f"{step}/{self._total}  held-out:", *shown]))

    def tick(self, step: int) -> None:
        pass

    def warn(self, sentence: str) -> None:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def interval_line(step: int, total: int, values: Numbers, timing: Numbers, eta: float) -> str:
    rate = timing["tokens_per_s"]
    width = len(str(total))
    return "  ".join(
        [
            f"{step:>{width}}/{total} ({step / total:6.1%})",
            f"loss {short(values['loss']):>7}",
            *(f"{part} {short(values[part + '_loss']):>6}" for part in ("mlm", "rtd", "clm")),
            f"rtd acc {percent(values['rtd_accuracy']):>6}",
            f"(base {percent(values.get('rtd_majority')):>5})",
            f"sampled right {percent(values.get('sample_accuracy')):>5}",
            f"lr {scientific(values['lr'])}",
            f"{'-' if rate is None else thousands(rate):>6} tok/s",
            f"MFU {percent(timing['mfu']):>5}",
            f"data wait {timing['data_wait']:.1%}",
            f"ETA {duration(eta)}",
        ]
    )


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def short(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        str(value) if isinstance(value, int) else f"{value:.5g}" if value >= 1e4 else f"{value:.4f}"
    )


def thousands(value: float) -> str:
    for unit, size in (("M", 1e6), ("K", 1e3)):
        if value >= size:
            return (
                f"{value / size:.3g}{unit}" if value < 1e3 * size else f"{value / size:.0f}{unit}"
            )
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
