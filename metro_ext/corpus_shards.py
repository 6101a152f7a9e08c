"""Shards put together from the units of a build."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from metro_ext.atomic import atomic_write
from metro_ext.corpus_format import (
    TOKEN_DTYPES,
    Shard,
    read_fields,
    shard_name,
    token_dtype_name,
)
from metro_ext.corpus_parts import kept_stretches, part_path
from metro_ext.errors import UserError

_TOKENS_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: `sources` are (unit, begin, end) in the tokens of it that stay."""

    index: int
    tokens: int
    sources: list[tuple[int, int, int]]


def shard_tasks(kept_tokens: Sequence[int], shard_tokens: int) -> Iterator[ShardTask]:
    """Cut the stream of all units' tokens into shards of equal size, the last one excepted.

    Args:
        kept_tokens: of each unit.
    """
    sources, index, filled = [], 0, 0
    for unit, count in enumerate(kept_tokens):
        begin = 0
        while begin < count:
            end = min(count, begin + shard_tokens - filled)
            sources.append((unit, begin, end))
            filled += end - begin
            begin = end
            if filled == shard_tokens:
                yield ShardTask(index, filled, sources)
                sources, index, filled = [], index + 1, 0
    if filled:
        yield ShardTask(index, filled, sources)


def write_shard(task: ShardTask, parts: Path, corpus: Path, vocab_size: int) -> Shard:
    """Write a shard and the counts of its ids, unless they are there and whole.

    Args:
        parts: the build's folder; it gets the shard's record and counts, int64 [vocab_size].
        corpus: the folder for the shard itself.

    Raises:
        UserError: the shard is damaged, and what it was made of has been removed.
    """
    dtype = np.dtype(TOKEN_DTYPES[token_dtype_name(vocab_size)])
    path = corpus / shard_name(task.index)
    record = parts / f"{path.name}.json"
    shard = read_fields(Shard, record)
    if path.exists() and shard is not None and shard.tokens == task.tokens:
        found, counts = _digest(_shard_blocks(path, dtype), vocab_size)
        if found == shard.sha256:
            _write_counts(parts, task.index, counts)
            return shard
    missing = [u for u, _, _ in task.sources if not part_path(parts, u, "ids").exists()]
    if missing:
        raise UserError(
            f"{path if shard else record}: damaged since it was written: remove the folder "
            f"{parts.parent} to build anew"
        )
    record.unlink(missing_ok=True)
    with atomic_write(path) as file:

        def written() -> Iterator[np.ndarray]:
            for block in _source_blocks(task, parts, dtype):
                file.write(block)
                yield block

        digest, counts = _digest(written(), vocab_size)
    shard = Shard(task.tokens, digest)
    _write_counts(parts, task.index, counts)
    with atomic_write(record, "w") as file:
        json.dump(asdict(shard), file)
    return shard


def read_counts(parts: Path, index: int) -> np.ndarray:
    """The counts that `write_shard` wrote: int64 [vocab_size]."""
    return np.fromfile(_counts_path(parts, index), "<i8")


def _counts_path(parts: Path, index: int) -> Path:
    return parts / f"{shard_name(index)}.counts"


def _write_counts(parts: Path, index: int, counts: np.ndarray) -> None:
    with atomic_write(_counts_path(parts, index)) as file:
        file.write(counts.astype("<i8"))


def _digest(blocks: Iterator[np.ndarray], vocab_size: int) -> tuple[str, np.ndarray]:
    """SHA-256 of all blocks, and how often each id occurs."""
    digest, counts = hashlib.sha256(), np.zeros(vocab_size, np.int64)
    for block in blocks:
        digest.update(block.data)
        counts += np.bincount(block, minlength=vocab_size)[:vocab_size]
    return digest.hexdigest(), counts


def _shard_blocks(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while (block := np.fromfile(file, dtype, _TOKENS_AT_ONCE)).size:
            yield block


def _source_blocks(task: ShardTask, parts: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    for unit, begin, end in task.sources:
        with open(part_path(parts, unit, "ids"), "rb") as file:
            place = 0  # among the tokens that stay
            for first, last in kept_stretches(parts, unit):
                a, b = max(begin, place), min(end, place + last - first)
                while a < b:
                    file.seek((first + a - place) * dtype.itemsize)
                    yield (block := np.fromfile(file, dtype, min(b - a, _TOKENS_AT_ONCE)))
                    a += block.size
                place += last - first
                if place >= end:
                    break
