"""A unit of a build: its documents encoded, as files that the shards are then put together from.

In a build's folder, for unit 17 (numbers are little-endian):

    00017.ids       the documents, `<s> ... </s> <s> ... </s> ...`, in the corpus's dtype
    00017.docs      a record of `DOCUMENT` for each
    00017.json      counts and checksums; written last, so it says that the others are whole
    00017.dropped   one byte a document, 1 for a duplicate; only where there is one

Duplicates are found by a hash of a document's ids. A vocabulary's pieces put together are the
normalised text (bytes stand for characters without a piece), so two documents have the same ids if
and only if they have the same normalised text.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from metro_ext.atomic import atomic_write, sha256_file
from metro_ext.corpus_format import TOKEN_DTYPES, read_fields, token_dtype_name
from metro_ext.corpus_plan import Plan
from metro_ext.text_files import Paragraph, read_paragraphs
from metro_ext.tokenizer import BOS_ID, EOS_ID
from metro_ext.word_encoder import WordEncoder

HASH_BYTES = 16  # of BLAKE2b: 2^64 documents for one chance collision
DOCUMENT = np.dtype([("tokens", "<u8"), ("text_bytes", "<u8"), ("hash", f"V{HASH_BYTES}")])

# Paragraphs are encoded this many at a time. The second limit is for text of very short lines,
# where the Python objects outweigh the characters.
_BATCH_CHARACTERS = 1 << 20
_BATCH_PARAGRAPHS = 1 << 15
_DOCUMENTS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class PartRecord:
    """What 00017.json holds."""

    tokens: int
    documents: int
    ids_sha256: str
    docs_sha256: str


def encode_unit(plan: Plan, unit: int, folder: Path, encoder: WordEncoder, vocab_size: int) -> int:
    """Make the files of a unit, unless they are there and whole; the number of its tokens.

    Raises:
        UserError: the text cannot be read.
    """
    if (record := _finished(folder, unit)) is not None:
        return record.tokens
    dtype = TOKEN_DTYPES[token_dtype_name(vocab_size)]
    paragraphs = itertools.chain.from_iterable(
        read_paragraphs(path, plan.options.field, part) for path, part in plan.parts(unit)
    )
    ids_path, docs_path = part_path(folder, unit, "ids"), part_path(folder, unit, "docs")
    with atomic_write(ids_path) as ids_file, atomic_write(docs_path) as docs_file:
        writer = _PartWriter(ids_file, docs_file, dtype, plan.options.dedup)
        for batch in _batches(paragraphs):
            ids, lengths = encoder.encode([paragraph.text for paragraph in batch])
            writer.add(batch, ids, lengths)
        writer.finish()
    record = PartRecord(
        writer.tokens, writer.documents, sha256_file(ids_path), sha256_file(docs_path)
    )
    with atomic_write(part_path(folder, unit, "json"), "w") as file:
        json.dump(asdict(record), file)
    return record.tokens


def part_path(folder: Path, unit: int, kind: str) -> Path:
    return folder / f"{unit:05d}.{kind}"


def read_record(folder: Path, unit: int) -> PartRecord:
    """The record of a unit that `encode_unit` has made or found whole."""
    return PartRecord(**json.loads(part_path(folder, unit, "json").read_bytes()))


def _finished(folder: Path, unit: int) -> PartRecord | None:
    """The record of a unit whose files are whole; its ids may have gone into shards already."""
    record = read_fields(PartRecord, part_path(folder, unit, "json"))
    if record is None:
        return None
    try:
        ids = part_path(folder, unit, "ids")
        if sha256_file(part_path(folder, unit, "docs")) != record.docs_sha256:
            return None
        if ids.exists() and sha256_file(ids) != record.ids_sha256:
            return None
        counts = [(one.size, int(one["tokens"].sum())) for one, _ in documents_of(folder, unit)]
    except OSError:
        return None
    documents, tokens = (sum(column) for column in zip((0, 0), *counts, strict=True))
    return record if (documents, tokens) == (record.documents, record.tokens) else None


def _batches(paragraphs: Iterable[Paragraph]) -> Iterator[list[Paragraph]]:
    batch: list[Paragraph] = []
    characters = 0
    for paragraph in paragraphs:
        batch.append(paragraph)
        characters += len(paragraph.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PARAGRAPHS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _PartWriter:
    """Documents on their way to a unit's files; one without any token is left out."""

    def __init__(self, ids_file: IO[bytes], docs_file: IO[bytes], dtype: str, hashes: bool):
        self.tokens = self.documents = 0
        self._ids_file, self._docs_file = ids_file, docs_file
        self._bos, self._eos = (np.array([i], dtype) for i in (BOS_ID, EOS_ID))
        self._hashes = hashes
        self._pending: list[np.ndarray] = []
        self._records: list[tuple[int, int, bytes]] = []
        self._open()

    def add(self, batch: list[Paragraph], ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append paragraphs: all their ids, and how many each has."""
        ids = ids.astype(self._bos.dtype)
        begin = 0
        for paragraph, length in zip(batch, lengths.tolist(), strict=True):
            if paragraph.starts_document:
                self._end_document()
            text = paragraph.text
            self._text_bytes += len(text) if text.isascii() else len(text.encode())
            if length:
                self._append(ids[begin : begin + length])
                begin += length
        self._flush()

    def finish(self) -> None:
        self._end_document()
        self._flush()

    def _open(self) -> None:
        self._length = self._text_bytes = 0
        self._hash = hashlib.blake2b(digest_size=HASH_BYTES) if self._hashes else None

    def _append(self, ids: np.ndarray) -> None:
        if not self._length:
            self._pending.append(self._bos)
            self._length = 1
        self._pending.append(ids)
        self._length += ids.size
        if self._hash is not None:
            self._hash.update(ids.data)

    def _end_document(self) -> None:
        if self._length:
            self._pending.append(self._eos)
            digest = bytes(HASH_BYTES) if self._hash is None else self._hash.digest()
            self._records.append((self._length + 1, self._text_bytes, digest))
            self.tokens += self._length + 1
            self.documents += 1
        if self._length or self._text_bytes:
            self._open()

    def _flush(self) -> None:
        if self._pending:
            self._ids_file.write(np.concatenate(self._pending).data)
        self._docs_file.write(np.array(self._records, DOCUMENT).data)
        self._pending, self._records = [], []


def documents_of(folder: Path, unit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents of a unit, some thousands at a time: records of `DOCUMENT`, and which stay."""
    dropped = part_path(folder, unit, "dropped")
    with contextlib.ExitStack() as files:
        docs = files.enter_context(open(part_path(folder, unit, "docs"), "rb"))
        drops = files.enter_context(open(dropped, "rb")) if dropped.exists() else None
        while block := docs.read(_DOCUMENTS_AT_ONCE * DOCUMENT.itemsize):
            records = np.frombuffer(block, DOCUMENT)
            keep = np.ones(records.size, bool)
            if drops is not None:
                keep = np.frombuffer(drops.read(records.size), np.uint8) == 0
            yield records, keep


def kept_stretches(folder: Path, unit: int) -> Iterator[tuple[int, int]]:
    """Where in 00017.ids the documents that stay lie: (begin, end) in tokens, neighbours as one."""
    if not part_path(folder, unit, "dropped").exists():
        yield 0, read_record(folder, unit).tokens
        return
    place = 0
    for records, keep in documents_of(folder, unit):
        ends = place + np.cumsum(records["tokens"].astype(np.int64))
        begins = np.concatenate(([place], ends[:-1]))
        first = keep & ~np.concatenate(([False], keep[:-1]))
        last = keep & ~np.concatenate((keep[1:], [False]))
        yield from zip(begins[first].tolist(), ends[last].tolist(), strict=True)
        place = int(ends[-1])
