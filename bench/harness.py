"""The one language of all benchmark scripts: cases, a table for people, a last line for programs.

A script measures `Case`s and ends with `emit`, which prints a table and then, as the last line,
one JSON object: ``script``, ``date`` (UTC), ``commit``, ``device``, ``machine``, ``ceilings`` and
``cases``. All times are seconds, medians over interleaved rounds of one run; a ratio above 1 means
that ours is the faster, and memory is in MB of 10^6 bytes.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from metro_ext.atomic import atomic_write
from metro_ext.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"
ABSENT = "absent: "
SOURCE_ENDINGS = (".cpp", ".h", ".cu", ".cuh")


@dataclass(frozen=True)
class Case:
    """One thing measured: ours, its peers, and the least it could take.

    name: of the case, shape and dtype included.
    ours: seconds, median.
    peers: seconds, median, by peer; or "absent: reason".
    lesser: peers that do less work than ours, and what they leave out. They are shown, with their
        own ratios, but are not in ``ratio``.
    floor_seconds: the work that no implementation can avoid, at the ceilings measured in this run.
    peak_mb, peers_peak_mb: peak memory of ours and of each peer; the script says of what.
    spread: fastest and slowest round by contender ("ours" and the peers), seconds.
    figures: what else the script reports, by name.
    """

    name: str
    ours: float
    peers: Mapping[str, float | str] = field(default_factory=dict)
    lesser: Mapping[str, str] = field(default_factory=dict)
    floor_seconds: float | None = None
    peak_mb: float | None = None
    peers_peak_mb: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        """Each present peer's time over ours."""
        return {
            name: seconds / self.ours
            for name, seconds in self.peers.items()
            if not isinstance(seconds, str)
        }

    @property
    def ratio(self) -> float | None:
        """The best peer's time over ours, among the peers that do all that ours does."""
        return min((r for name, r in self.ratios.items() if name not in self.lesser), default=None)

    @property
    def peak_ratios(self) -> dict[str, float]:
        """Our peak memory over each peer's."""
        if self.peak_mb is None:
            return {}
        return {name: self.peak_mb / mb for name, mb in self.peers_peak_mb.items() if mb > 0}

    @property
    def floor_share(self) -> float | None:
        """Floor over our time: 1 is the limit of the machine."""
        return None if self.floor_seconds is None else self.floor_seconds / self.ours

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ours": self.ours,
            "peers": dict(self.peers),
            "ratio": self.ratio,
            "ratios": self.ratios,
            "lesser": dict(self.lesser),
            "floor_seconds": self.floor_seconds,
            "floor_share": self.floor_share,
            "peak_mb": self.peak_mb,
            "peers_peak_mb": dict(self.peers_peak_mb),
            "peak_ratios": self.peak_ratios,
            "spread": {name: list(times) for name, times in self.spread.items()},
            "figures": dict(self.figures),
        }


def emit(
    script: str,
    cases: Iterable[Case],
    *,
    ceilings: Mapping[str, float] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    output: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Prints the table and, as the last line, the record as one line of JSON; returns the record.

    Args:
        output: file to write the record to as well; a bare name lies in ``bench/results``.
        script, cases, ceilings, threads, device: as in `record_of`.
    """
    cases = list(cases)
    record = record_of(script, cases, ceilings=ceilings, threads=threads, device=device)
    print(table(cases))
    for name, value in record["ceilings"].items():
        print(f"measured ceiling: {name} {value:g}")
    if output is not None:
        _write(output, record)
    print_record(record)
    return record


def print_record(record: Mapping[str, Any]) -> None:
    """As one line of JSON."""
    print(json.dumps(record, allow_nan=False), flush=True)


def record_of(
    script: str,
    cases: Iterable[Case],
    *,
    ceilings: Mapping[str, float] | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """What the files in ``bench/results`` hold.

    Args:
        script: name of the script, as in ``bench/<script>.py``.
        ceilings: rates measured in this run, by a name that ends in the unit.
        threads: CPU threads of the contenders; None: torch's number in this process.
        device: that the contenders ran on, "cpu" or "cuda".
    """
    record = {
        "script": script,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "machine": machine(threads),
        "ceilings": dict(ceilings or {}),
        "cases": [case.to_json() for case in cases],
    }
    return _rounded(record)


def _write(output: str | os.PathLike, record: dict[str, Any]) -> None:
    path = Path(output)
    if path.parent == Path():
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / path
    if not path.parent.is_dir():
        raise UserError(f"--output: there is no folder {path.parent}; make it or name another file")
    with atomic_write(path, "w") as file:
        file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"written to {path}")


def table(cases: Iterable[Case]) -> str:
    """A block a case: contender, time, ratio to ours, peak memory, spread."""
    lines = []
    for case in cases:
        lines += [case.name, f"  {'':<28}{'median':>10}  {'ratio':>6}  {'peak MB':>8}  spread"]
        note = "" if case.floor_share is None else f"  {case.floor_share:.0%} of the floor"
        lines.append(_row("ours", case, case.ours, "", case.peak_mb, note))
        for name, seconds in case.peers.items():
            if isinstance(seconds, str):
                lines.append(f"  {name:<28}{seconds}")
                continue
            note = f"  (without: {case.lesser[name]})" if name in case.lesser else ""
            ratio = f"{case.ratios[name]:.2f}x"
            lines.append(_row(name, case, seconds, ratio, case.peers_peak_mb.get(name), note))
        if case.floor_seconds is not None:
            lines.append(f"  {'floor':<28}{seconds_text(case.floor_seconds):>10}")
        lines += [f"  {name}: {_figure_text(value)}" for name, value in case.figures.items()]
        lines.append("")
    return "\n".join(lines)


def _row(
    name: str, case: Case, seconds: float, ratio: str, peak_mb: float | None, note: str
) -> str:
    peak = "" if peak_mb is None else f"{peak_mb:.1f}"
    low, high = case.spread.get(name, (seconds, seconds))
    spread = f"{seconds_text(low)} - {seconds_text(high)}"
    return f"  {name:<28}{seconds_text(seconds):>10}  {ratio:>6}  {peak:>8}  {spread}{note}"


def seconds_text(seconds: float) -> str:
    """With a unit and four digits: ``12.34 ms``."""
    if seconds >= 1:
        return f"{seconds:#.4g} s"
    return f"{seconds * 1e3:#.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:#.4g} us"


def _figure_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_figure_text(item)}" for key, item in value.items())
    return f"{value:,.5g}" if isinstance(value, float) else str(value)


def _rounded(value: Any) -> Any:
    """Floats to six digits: more would be noise, and the line is read by people too."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def commit() -> str:
    """The commit that is checked out, "+dirty" with uncommitted changes; "unknown" without git.

    New results do not count as changes: they are written by the script that asks.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return head + ("+dirty" if changes else "")


def sources() -> str:
    """A digest of what the benchmarks measure, C++, CUDA and Python: it needs no git."""
    digest = hashlib.sha256()
    files = [REPOSITORY / "CMakeLists.txt"]
    for folder, endings in (("csrc", SOURCE_ENDINGS), ("metro_ext", (".py",))):
        found = (REPOSITORY / folder).rglob("*")
        files += sorted(path for path in found if path.suffix in endings)
    for path in files:
        digest.update(f"{path.relative_to(REPOSITORY).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine(threads: int | None = None) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "isa": _instruction_set(),
        "malloc": _allocator(),
        "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads() if threads is None else threads,
    }


def _instruction_set() -> str | None:
    """Of the CPU kernels; None before the extension is built."""
    try:
        from metro_ext import _C
    except ImportError:
        return None
    return _C.cpu_isa()


def _allocator() -> str:
    """The C library's, or what stands in for it: the peak of a process is also its allocator's."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    return " ".join((*(Path(name).name for name in preloaded.split()), *platform.libc_ver()))


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
