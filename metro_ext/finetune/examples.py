"""What every loader gives, and how it reads official files: plain or .xz, errors with the line."""

import json
import lzma
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metro_ext.errors import UserError


@dataclass(frozen=True)
class Example:
    """One text or pair of texts.

    label: index into the task's labels, a score for regression, None in a test set.
    group: examples of one group are one question (several choices or answers).
    index: what a submission file calls it.
    """

    text: str
    pair: str | None
    label: int | float | None
    index: Hashable
    group: Hashable = None


def find(folder: Path, name: str) -> Path:
    """The file of that name, plain or with .xz after it."""
    for path in (folder / name, folder / f"{name}.xz"):
        if path.is_file():
            return path
    raise UserError(f"{folder / name}: there is no such file, nor {name}.xz: check --data")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their line breaks; blank lines at the end are passed over."""
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 ({error})") from None
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path}: the compressed file is damaged or cut short ({error})") from None


def tsv_rows(path: Path, columns: list[str] | None, needed: list[str]) -> Iterator:
    """(line number, {column: text}); ``columns`` is None where the first line has their names.

    No quoting: a quotation mark is text. A row must have every needed column.
    """
    for number, line in lines(path):
        cells = line.split("\t")
        if columns is None:
            columns = cells
            for name in needed:
                if name not in columns:
                    raise UserError(
                        f"{path}: line 1: expected a column {name!r}, found {', '.join(columns)}"
                    )
            continue
        # Lines of SNLI's parses and of QQP may hold more cells; the needed ones must be there.
        row = dict(zip(columns, cells, strict=False))
        for name in needed:
            if name not in row:
                raise UserError(
                    f"{path}: line {number}: expected {len(columns)} columns "
                    f"({', '.join(columns)}), found {len(cells)}"
                )
        yield number, row


def json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a file with a JSON object a line."""
    for number, line in lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: expected a JSON object ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number}: expected a JSON object, found {line[:40]!r}")
        yield number, record


def field(path: Path, number: int, record: dict, name: str, kind: type | tuple = str):
    """A field of a JSON object, of the type that the format asks for."""
    if not isinstance(record, dict):
        raise UserError(f"{path}: line {number}: expected a JSON object, found {record!r:.60}")
    if name not in record:
        raise UserError(
            f"{path}: line {number}: expected a field {name!r}, found {', '.join(sorted(record))}"
        )
    if not isinstance(record[name], kind):
        raise UserError(
            f"{path}: line {number}: field {name!r} must be {kind}, found {record[name]!r}"
        )
    return record[name]


def label_index(path: Path, number: int, labels: tuple[str, ...], found: object) -> int:
    """The index of a label; UserError where the set does not hold it."""
    if isinstance(found, bool):
        found = str(found).lower()
    if str(found) not in labels:
        raise UserError(
            f"{path}: line {number}: expected a label of {', '.join(labels)}, found {found!r}"
        )
    return labels.index(str(found))
