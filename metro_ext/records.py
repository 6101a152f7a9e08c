"""Rows of task files: JSON lines, one JSON document, tab-separated; plain or compressed.

Every row comes with where it stands ("FILE: line N"), and `field` and `label_index` check what it
holds, so that wrong data is reported by place, expectation and finding.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metro_ext.errors import UserError
from metro_ext.text_files import COMPRESSIONS, decode, open_binary, reporting_damage

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false",
          list: "a list", dict: "an object"}  # fmt: skip


def find(folder: Path, name: str) -> Path:
    """The file of that name, plain or compressed."""
    for end in COMPRESSIONS:
        if (path := folder / f"{name}{end}").is_file():
            return path
    raise UserError(f"{folder / name}: there is no such file, nor {name}.xz: check --data")


def find_in(data: Path, folder: str, name: str) -> Path:
    """`find` in a folder of ``data``, or in ``data`` itself where there is no such folder."""
    return find(data / folder if (data / folder).is_dir() else data, name)


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line without its break); blank lines are passed over."""
    offset = 0
    with open_binary(path) as file, reporting_damage(path):
        for number, raw in enumerate(file, start=1):
            line = decode(raw, path, number, offset)
            offset += len(raw)
            if line.strip():
                yield f"{path}: line {number}", line.rstrip("\r\n")


def tsv_rows(
    path: Path, columns: list[str] | None, needed: list[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, {column: text}); ``columns`` is None where the first line has their names.

    No quoting: a quotation mark is text. A row must have every needed column.
    """
    for where, line in lines(path):
        cells = line.split("\t")
        if columns is None:
            columns = cells
            for name in needed:
                if name not in columns:
                    raise UserError(
                        f"{where}: expected a column {name!r}, found {', '.join(columns)}"
                    )
            continue
        # Lines of SNLI's parses and of QQP may hold more cells; the needed ones must be there.
        row = dict(zip(columns, cells, strict=False))
        for name in needed:
            if name not in row:
                raise UserError(
                    f"{where}: expected {len(columns)} columns ({', '.join(columns)}), "
                    f"found {len(cells)}"
                )
        yield where, row


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of a file with a JSON value a line."""
    for where, line in lines(path):
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: expected JSON ({error})") from None


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, object) of a file with a JSON object a line."""
    for where, record in json_lines(path):
        yield where, checked(where, record, dict)


def read_json(path: Path) -> object:
    """The document of a file; UserError for what is no JSON, no UTF-8, or damaged compression."""
    with open_binary(path) as file, reporting_damage(path):
        raw = file.read()
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON document ({error})") from None


def field(where: str, record: object, name: str, *kinds: type) -> Any:
    """A field of a JSON object, of one of the kinds (default: text)."""
    fields = checked(where, record, dict)
    if name not in fields:
        names = ", ".join(sorted(fields)) or "none"
        raise UserError(f"{where}: expected a field {name!r}, found {names}")
    return checked(f"{where}: field {name!r}", fields[name], *kinds or (str,))


def checked(where: str, value: object, *kinds: type) -> Any:
    """The value, if it is of one of the kinds: true and false are no numbers, nor is NaN."""
    wrong = isinstance(value, bool) and bool not in kinds
    wrong |= isinstance(value, float) and not math.isfinite(value)
    if wrong or not isinstance(value, kinds):
        shown = [kind for kind in kinds if kind is not int or float not in kinds]
        expected = " or ".join(_WORDS[kind] for kind in shown)
        raise UserError(f"{where}: expected {expected}, found {json.dumps(value):.60}")
    return value


def number(where: str, text: str, low: float, high: float, what: str = "a number") -> float:
    """A cell of a table as a number of low ... high."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UserError(f"{where}: expected {what} from {low:g} to {high:g}, found {text!r}")
    return value


def label_index(where: str, labels: tuple[str, ...], found: object) -> int:
    """The index of a label; UserError where the set does not hold it."""
    if isinstance(found, bool):
        found = str(found).lower()
    if str(found) not in labels:
        raise UserError(f"{where}: expected a label of {', '.join(labels)}, found {found!r}")
    return labels.index(str(found))
