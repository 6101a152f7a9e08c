"""Pairs of texts for a contrastive fine-tune, and scored pairs to judge it by.

Pairs, plain or compressed, a hard negative being optional throughout:

    .jsonl   {"anchor": ..., "positive": ..., "negative": ...}, or [anchor, positive, negative]
    .tsv     columns ``anchor``, ``positive``, ``negative``, named in the first line

Scored pairs are STS-B's .tsv: columns ``sentence1``, ``sentence2``, ``score``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from metro_ext.errors import UserError
from metro_ext.records import checked, field, find, json_lines, number, tsv_rows

FIELDS = ("anchor", "positive", "negative")


class Pair(NamedTuple):
    """Two texts that belong together, and perhaps one that does not belong to the first."""

    anchor: str
    positive: str
    negative: str | None = None


class ScoredPair(NamedTuple):
    """Two texts and how alike they are, from 0 to 5."""

    first: str
    second: str
    score: float


def find_pairs(folder: Path) -> Path:
    """``train.jsonl`` or ``train.tsv``, plain or compressed."""
    try:
        return find(folder, "train.jsonl")
    except UserError:
        return find(folder, "train.tsv")


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file; UserError names file, line and what was expected."""
    reader = _json_pairs if ".jsonl" in path.suffixes else _tsv_pairs
    found = []
    for where, pair in reader(path):
        for name, text in zip(FIELDS, pair, strict=False):
            if text is not None and not text.strip():
                raise UserError(f"{where}: expected some text as {name}, found none")
        found.append(pair)
    if not found:
        raise UserError(f"{path}: expected pairs of texts, found none")
    return found


def _json_pairs(path: Path) -> Iterator[tuple[str, Pair]]:
    for where, value in json_lines(path):
        if isinstance(value, list):
            if len(value) not in (2, 3):
                raise UserError(f"{where}: expected a list of 2 or 3 texts, found {len(value)}")
            yield where, Pair(*(checked(where, text, str) for text in value))
            continue
        names = FIELDS if "negative" in checked(where, value, dict) else FIELDS[:2]
        yield where, Pair(*(field(where, value, name) for name in names))


def _tsv_pairs(path: Path) -> Iterator[tuple[str, Pair]]:
    for where, row in tsv_rows(path, None, ["anchor", "positive"]):
        yield where, Pair(row["anchor"], row["positive"], row.get("negative") or None)


def read_scored(path: Path) -> list[ScoredPair]:
    """The pairs of a file in STS-B's format."""
    found = [
        ScoredPair(row["sentence1"], row["sentence2"],
                   number(where, row["score"], 0, 5, "a score"))
        for where, row in tsv_rows(path, None, ["sentence1", "sentence2", "score"])
    ]  # fmt: skip
    if not found:
        raise UserError(f"{path}: expected scored pairs of texts, found none")
    return found
