"""From text files to a corpus folder: on several processes, in constant memory, restartable.

First each unit of the input is encoded (`corpus_parts`), then duplicates are found
(`corpus_dedup`), then the shards are put together (`corpus_shards`). Each step's files appear when
they are whole, and the same command takes them up where a build was killed. What comes out depends
on the input and the options alone.
"""

import contextlib
import fcntl
import functools
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from metro_ext.atomic import atomic_write, fsync_folder
from metro_ext.corpus_dedup import mark_duplicates
from metro_ext.corpus_format import (
    COUNTS,
    DOCUMENT_DTYPE,
    DOCUMENTS,
    TOKENIZER,
    Manifest,
    Shard,
    token_dtype_name,
    write_manifest,
)
from metro_ext.corpus_parts import documents_of, part_path
from metro_ext.corpus_plan import PLAN, Options, Plan, begin_or_resume, make_plan
from metro_ext.corpus_shards import read_counts, shard_tasks
from metro_ext.corpus_workers import CORPUS, PARTS, TOKENIZER_COPY, WorkerEnded, Workers
from metro_ext.errors import UserError
from metro_ext.tokenizer import Tokenizer

DEFAULT_SHARD_TOKENS = 1 << 27  # 256 MiB of uint16


def build_corpus(
    inputs: Iterable[str | os.PathLike],
    tokenizer: Tokenizer,
    output: str | os.PathLike,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    field: str = "text",
    workers: int | None = None,
    dedup: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> Manifest:
    """Encode text files into a new corpus folder.

    The work is done in a hidden folder beside the output (`work_folder`), and the corpus is renamed
    when it is complete and on disk: a build that is killed leaves nothing that looks like a corpus.
    The same call then goes on with it; a build that ends on bad text removes what it has.

    Args:
        inputs: text files or folders (`metro_ext.text_files`).
        tokenizer: its model is copied into the folder.
        output: the folder to make.
        shard_tokens: tokens a shard file; the last one may hold fewer.
        field: the field of .jsonl lines, the column of .parquet files, that holds the text.
        workers: processes; default: the cores this process may use. One works in this process.
        dedup: keep only the first of documents whose normalised text is equal.
        progress: called now and then with the number of tokens encoded so far, and the share of
            the text that this is.

    Raises:
        UserError: the output exists already, bad input, no text in it, or an unfinished build
            with other options or changed input.
        OSError: the operating system refused, a full disk among the reasons.
    """
    output = Path(output)
    _check_new(output)
    if shard_tokens < 1:
        raise UserError(f"expected at least 1 token a shard, found {shard_tokens}")
    workers = _usable_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"expected at least 1 worker, found {workers}")
    plan = make_plan(inputs, Options(tokenizer.sha256, shard_tokens, field, dedup))
    folder = work_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _check_new(output)
        if not (folder / CORPUS).exists():  # killed before it began, or after the rename
            shutil.rmtree(folder / PARTS, ignore_errors=True)
            (folder / PLAN).unlink(missing_ok=True)
        begin_or_resume(folder, plan)
        tokenizer.save(folder / TOKENIZER_COPY)
        manifest = _build(folder, plan, tokenizer, workers, progress)
        os.rename(folder / CORPUS, output)
        shutil.rmtree(folder)
    fsync_folder(output.parent)
    return manifest


def work_folder(output: Path) -> Path:
    """Where the build of a corpus keeps what it has done."""
    return output.parent / f".{output.name}.build"


def _check_new(output: Path) -> None:
    if output.exists():
        raise UserError(f"{output}: it exists already: remove it or name another")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time; the kernel drops the lock when the process ends, however it ends."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at work on this corpus: wait for it to end, or name "
                "another output"
            ) from None
        yield


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: what a container or taskset leaves us
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _build(
    folder: Path,
    plan: Plan,
    tokenizer: Tokenizer,
    workers: int,
    progress: Callable[[int, float], None] | None,
) -> Manifest:
    parts, corpus = folder / PARTS, folder / CORPUS
    for one in (parts, corpus):
        one.mkdir(exist_ok=True)
        for leftover in one.glob(".*.partial"):
            leftover.unlink()
    with Workers(folder, min(workers, len(plan.units))) as pool:
        try:
            _encode(pool, plan, progress)
        except WorkerEnded:
            raise
        except UserError:  # a mistake in the text: what was made of it is of no more use
            shutil.rmtree(folder)
            raise
        if plan.options.dedup:
            mark_duplicates(parts, len(plan.units))
        starts = _DocumentStarts(parts, len(plan.units))
        with atomic_write(corpus / DOCUMENTS) as file:
            for block in starts:
                file.write(block)
        shards = _shards(pool, parts, starts.unit_tokens, plan.options.shard_tokens)
    counts = functools.reduce(np.add, (read_counts(parts, i) for i in range(len(shards))))
    with atomic_write(corpus / COUNTS) as file:
        file.write(counts)
    tokenizer.save(corpus / TOKENIZER)
    manifest = Manifest(
        documents=starts.documents,
        tokens=sum(starts.unit_tokens),
        text_bytes=starts.text_bytes,
        dtype=token_dtype_name(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        documents_sha256=starts.sha256.hexdigest(),
        unigram_entropy_nats=unigram_entropy(counts, tokenizer.special_ids),
        shards=tuple(shards),
        counts_sha256=hashlib.sha256(counts.data).hexdigest(),
        duplicates=starts.duplicates if plan.options.dedup else None,
    )
    write_manifest(corpus, manifest)
    return manifest


def _encode(pool: Workers, plan: Plan, progress: Callable[[int, float], None] | None) -> None:
    tokens = 0
    for done, count in enumerate(pool.encode(range(len(plan.units))), 1):
        tokens += count
        if progress is not None:
            progress(tokens, done / len(plan.units))
    plan.check_files()
    if tokens == 0:
        raise UserError("the input holds no text: there is nothing to build a corpus from")


def _shards(
    pool: Workers, parts: Path, unit_tokens: Sequence[int], shard_tokens: int
) -> list[Shard]:
    """Write the shards; a unit's ids are removed when they are in shards, to spare the disk."""
    tasks = list(shard_tasks(unit_tokens, shard_tokens))
    done: dict[int, Shard] = {}
    removed = first = 0
    for index, shard in pool.shards(tasks):
        done[index] = shard
        while first in done:
            first += 1
        needed = tasks[first].sources[0][0] if first < len(tasks) else len(unit_tokens)
        for unit in range(removed, needed):
            part_path(parts, unit, "ids").unlink(missing_ok=True)
        removed = max(removed, needed)
    return [done[index] for index in range(len(tasks))]


class _DocumentStarts:
    """Iterates over where the documents that stay start, in blocks; the figures are for after.

    Attributes:
        unit_tokens: of each unit, the tokens that stay.
        documents, text_bytes: what stays.
        duplicates: documents that do not.
        sha256: of all blocks.
    """

    def __init__(self, parts: Path, units: int):
        self._parts, self._units = parts, units
        self.unit_tokens: list[int] = []
        self.documents = self.text_bytes = self.duplicates = 0
        self.sha256 = hashlib.sha256()

    def __iter__(self) -> Iterator[np.ndarray]:
        place = 0
        for unit in range(self._units):
            first = place
            for records, keep in documents_of(self._parts, unit):
                stay = records[keep]
                ends = place + np.cumsum(stay["tokens"])
                block = (ends - stay["tokens"]).astype(DOCUMENT_DTYPE)
                place += int(stay["tokens"].sum())
                self.documents += stay.size
                self.duplicates += records.size - stay.size
                self.text_bytes += int(stay["text_bytes"].sum())
                self.sha256.update(block)
                yield block
            self.unit_tokens.append(place - first)


def unigram_entropy(counts: np.ndarray, special_ids: Sequence[int]) -> float:
    """Entropy, in nats a token, of the distribution that `counts` gives over non-special tokens.

    Args:
        counts: int64 [vocab_size], how often each id occurs.
        special_ids: ids to leave out.
    """
    counts = np.delete(counts, special_ids).astype(np.float64)
    counts = counts[counts > 0]
    total = counts.sum()
    # H = log n - (1/n) sum_i c_i log c_i, which rounding must not take below 0.
    return max(0.0, math.log(total) - float((counts * np.log(counts)).sum() / total))
