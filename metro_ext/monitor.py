"""What a run tells: a line an interval or a panel on a terminal, and records to compare and plot.

Files in the run's folder, one JSON object a line:

- `metrics.jsonl`: training metrics of an interval. Holds nothing that depends on the clock, so
  that a resumed run's file is byte for byte that of the unbroken run.
- `evaluation.jsonl`: metrics on held-out text, likewise.
- `timing.jsonl`: tokens_per_s, mfu (share of the peak FLOP/s, null where the peak is unknown),
  seconds (of the interval, without evaluations and checkpoints), data_wait (the share of them
  that the loop stood still for a batch) and peak_mb (most memory so far, in MB of 10^6 bytes: of
  the process on a CPU, of torch's tensors on a GPU; of a resumed run since it was resumed).

Numbers are written so that they read back as the same bits; a metric that the objective does not
have is null; NaN and infinity, which JSON lacks, are the strings float() reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from metro_ext.atomic import atomic_write
from metro_ext.boards import Board
from metro_ext.errors import UserError
from metro_ext.progress import Lines, Progress

# Present in every record of metrics.jsonl, in this order after `step`.
TRAINING_KEYS = (
    "loss", "mlm_loss", "rtd_loss", "clm_loss", "rtd_accuracy", "grad_norm", "lr", "tokens",
)  # fmt: skip
METRICS_FILE, TIMING_FILE, EVALUATION_FILE = "metrics.jsonl", "timing.jsonl", "evaluation.jsonl"


class Monitor:
    """Reports a run's progress; a context manager that closes its files.

    run_dir: folder of the records; made if it is not there.
    total_steps: steps of the whole run.
    resumed_step: 0 begins anew and empties the records; otherwise records past this step, and a
        last line torn by a kill, are dropped, and the rest goes on.
    resumed_tokens: tokens seen up to resumed_step.
    checksums: what `sync` returned at resumed_step; records that differ are warned of.
    flops_per_token, peak_flops: FLOPs a token costs, FLOP/s the hardware can do, for the MFU.
    peak_memory: gives the most bytes that were held so far; None: peak_mb is null.
    boards: told every number too, and closed with the monitor (`metro_ext.boards`).
    stream: where progress is shown, by default the standard output at the time of the call: as a
        panel on a terminal where rich is installed, else in lines.
    clock: seconds from any start.

    Raises UserError where a file cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        *,
        resumed_step: int = 0,
        resumed_tokens: int = 0,
        checksums: Mapping[str, str] = MappingProxyType({}),
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        peak_memory: Callable[[], int] | None = None,
        boards: Sequence[Board] = (),
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total = total_steps
        self._step = resumed_step
        self._tokens: float = resumed_tokens
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._peak_memory, self._clock = peak_memory, clock
        self._boards = list(boards)
        self._records = {
            name: _Records(Path(run_dir) / name, resumed_step)
            for name in (METRICS_FILE, TIMING_FILE, EVALUATION_FILE)
        }
        self._progress = _progress(stream or sys.stdout, str(run_dir), total_steps, resumed_step)
        self._interval_start = clock()
        self._waited = 0.0
        for name, records in self._records.items():
            if checksums.get(name, records.checksum) != records.checksum:
                self.warn(
                    f"{Path(run_dir) / name} is damaged or was changed: its lines up to step "
                    f"{resumed_step} are not those that the checkpoint saw; the run goes on"
                )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records an interval that ends with `step`, and prints its line.

        metrics: any of TRAINING_KEYS and further deterministic ones; numbers, 0-d tensors or None.
            `tokens` counts from the run's beginning.
        """
        values = {key: _number(metrics.get(key)) for key in TRAINING_KEYS}
        values |= {key: _number(value) for key, value in metrics.items()}
        now = self._clock()
        seconds = max(now - self._interval_start, 1e-9)
        tokens = values["tokens"]  # a whole number
        tokens_per_s = mfu = None
        if tokens is not None:
            tokens_per_s = (tokens - self._tokens) / seconds
            if self._flops_per_token and self._peak_flops:
                mfu = tokens_per_s * self._flops_per_token / self._peak_flops
            self._tokens = tokens
        eta = (self._total - step) * seconds / max(step - self._step, 1)
        timing = {
            "tokens_per_s": tokens_per_s,
            "mfu": mfu,
            "seconds": seconds,
            "data_wait": self._waited / seconds,
            "peak_mb": self._peak_memory() / 1e6 if self._peak_memory else None,
        }
        self._waited = 0.0
        self._records[METRICS_FILE].append(step, values)
        self._records[TIMING_FILE].append(step, timing)
        self._to_boards("train", step, values | timing)
        self._progress.interval(step, values, timing, eta)
        self._step, self._interval_start = step, now

    def log_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records metrics on held-out text and prints them on a line."""
        values = {key: _number(value) for key, value in metrics.items()}
        self._records[EVALUATION_FILE].append(step, values)
        self._to_boards("eval", step, values)
        self._progress.evaluation(step, values)

    def tick(self, step: int) -> None:
        """Call after every step: moves the bar where there is a terminal to show it."""
        self._progress.tick(step)

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Around what is not training (evaluation, checkpoint): not counted in tokens/s."""
        start = self._clock()
        try:
            yield
        finally:
            self._interval_start += self._clock() - start

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the fetching of batches: counted in data_wait."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def warn(self, sentence: str) -> None:
        """Shows a warning, on the standard error or above the panel."""
        self._progress.warn(sentence)

    def sync(self) -> dict[str, str]:
        """Puts all records on disk; call before a checkpoint that a resume will count on.

        Returns the SHA-256 of each file, by name, for the checkpoint to keep.
        """
        for records in self._records.values():
            records.sync()
        for board in self._boards:
            board.flush()
        return {name: records.checksum for name, records in self._records.items()}

    def close(self) -> None:
        self._progress.close()
        for records in self._records.values():
            records.close()
        for board in self._boards:
            board.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _to_boards(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        known = {f"{group}/{key}": value for key, value in values.items() if value is not None}
        for board in self._boards:
            board.add(step, known)


def _progress(stream: TextIO, title: str, total: int, step: int) -> Progress:
    if not stream.isatty():
        return Lines(stream, total)
    try:
        from metro_ext import progress_live  # rich takes a while to import
    except ImportError:
        return Lines(stream, total)
    console = progress_live.terminal(stream)
    if console is None:
        return Lines(stream, total)
    return progress_live.Panelled(console, title, total, step)


class Silent:
    """A Monitor that records nothing: that of the ranks other than the first."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def log_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def tick(self, step: int) -> None:
        pass

    def untimed(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def waiting_for_data(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def warn(self, sentence: str) -> None:
        pass

    def sync(self) -> dict[str, str]:
        return {}

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, without a torn last line; none where there is no file.

    Raises UserError for a line that is not a record.
    """
    return [record for _, record in _whole_lines(Path(path))]


class _Records:
    """A file of JSON lines that is only ever appended to."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes() if path.exists() else b""
            kept = b""
            if resumed_step > 0:
                lines = (ln for ln, record in _whole_lines(path) if record["step"] <= resumed_step)
                kept = b"".join(lines)
            if kept != before:
                with atomic_write(path, "wb") as file:
                    file.write(kept)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (stays open)
        self._digest = hashlib.sha256(kept)

    @property
    def checksum(self) -> str:
        """SHA-256 of all that the file holds, as 64 hexadecimal digits."""
        return self._digest.hexdigest()

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": step} | {key: _plain(value) for key, value in values.items()}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        self._digest.update(line)
        rest = memoryview(line)
        with _writing(self._path):
            while rest:  # a write to a disk that fills up may be short
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        with _writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; see to that and run the same command to go on"
        ) from None


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn or empty
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"line {number} of {path} is not a record (a JSON object with a whole number "
                "'step'); mend or remove that line to go on"
            ) from None
        found.append((line + b"\n", record))
    return found


def _number(value: Any) -> int | float | None:
    """A plain number: 0-d tensors and NumPy scalars give theirs."""
    if hasattr(value, "item"):
        value = value.item()
    return value if value is None or isinstance(value, int) else float(value)


def _plain(value: int | float | None) -> int | float | str | None:
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
