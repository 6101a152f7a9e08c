"""Records of bench/results, and what every table of them is made with."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metro_ext.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A record and the file that it is of; those inside a gpu_check record carry its file."""

    file: str
    record: Record

    @property
    def script(self) -> str:
        return self.record.get("script", "")

    @property
    def device(self) -> str:
        return self.record.get("device", "cpu")


def read(folder: Path) -> list[Source]:
    """The records of a folder in the order of their files; those of a gpu_check's benchmarks too.

    Raises:
        UserError: there is none, or a file is not a JSON object.
    """
    sources = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: expected a JSON object, found {type(record).__name__}")
        sources.append(Source(path.name, record))
        if sources[-1].script == "gpu_check":
            sources += _nested(sources[-1])
    if not sources:
        raise UserError(f"{folder}: there are no results; write some with --output of a benchmark")
    return sources


def _nested(source: Source) -> list[Source]:
    """The benchmarks of a GPU check; its families of operators become one record again."""
    records = [stage["record"] for stage in source.record["stages"] if "record" in stage]
    ops = [record for record in records if record["script"] == "ops"]
    merged = []
    if ops:
        cases = [case for record in ops for case in record["cases"]]
        merged = [ops[0] | {"cases": cases}]
    nested = [*(r for r in records if r not in ops), *merged]
    # A machine that got the tree without git knows its commit only from the check's command line.
    commits = {"commit": source.record["commit"]}
    return [Source(source.file, r | commits) for r in nested]


def markdown(
    header: Sequence[str], rows: Iterable[Sequence[object]], words: Sequence[str] = ()
) -> str:
    """A table; the first column and those named in ``words`` hold words, the others figures."""
    rules = ["---" if i == 0 or name in words else "---:" for i, name in enumerate(header)]
    lines = [list(header), rules]
    lines += [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def place(source: Source) -> str:
    machine = source.record["machine"]
    if source.device == "cuda":
        return machine["gpu"]
    preloaded = "".join(f", {w}" for w in machine.get("malloc", "").split() if ".so" in w)
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}{preloaded}"


def where(source: Source) -> str:
    """A line of what a record was measured on."""
    machine = source.record["machine"]
    return (
        f"{place(source)}; torch {machine['torch']}; commit {source.record['commit']}, "
        f"{source.record['date'][:10]}; `{source.file}`"
    )
