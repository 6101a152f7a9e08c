"""From text files to a corpus folder, in constant memory."""

import contextlib
import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from metro_ext.atomic import fsync_folder, temporary_sibling
from metro_ext.corpus_format import (
    DOCUMENT_DTYPE,
    DOCUMENTS,
    TOKEN_DTYPES,
    TOKENIZER,
    Manifest,
    Shard,
    shard_name,
    token_dtype_name,
    write_manifest,
)
from metro_ext.errors import UserError
from metro_ext.text_files import Paragraph, find_text_files, read_paragraphs
from metro_ext.tokenizer import Tokenizer

DEFAULT_SHARD_TOKENS = 1 << 27  # 256 MiB of uint16

# Paragraphs are encoded this many at a time: enough to keep several threads busy. The second limit
# is for text of very short lines, where the Python objects outweigh the characters.
_BATCH_CHARACTERS = 1 << 22
_BATCH_PARAGRAPHS = 1 << 17


def build_corpus(
    inputs: Iterable[str | os.PathLike],
    tokenizer: Tokenizer,
    output: str | os.PathLike,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    jsonl_field: str = "text",
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Encode text files into a new corpus folder.

    The folder grows under a hidden temporary name and is renamed when it is complete and on disk:
    a build that fails or is killed leaves nothing that looks like a corpus.

    Args:
        inputs: text files or folders (`metro_ext.text_files`).
        tokenizer: its model is copied into the folder.
        output: the folder to make.
        shard_tokens: tokens a shard file; the last one may hold fewer.
        jsonl_field: the field of .jsonl lines that holds the text.
        threads: of the encoder; default: the cores this process may use.
        progress: called now and then with the number of tokens written so far.

    Raises:
        UserError: the output exists already, bad input, or no text in it.
        OSError: the operating system refused, a full disk among the reasons.
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"{output}: it exists already: remove it or name another")
    if shard_tokens < 1:
        raise UserError(f"expected at least 1 token a shard, found {shard_tokens}")
    files = find_text_files(inputs)
    threads = threads or _usable_cores()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_sibling(output)
    folder.mkdir()
    try:
        with contextlib.closing(_Writer(folder, tokenizer, shard_tokens)) as writer:
            for batch in _batches(files, jsonl_field):
                _encode(batch, tokenizer, threads, writer)
                if progress is not None:
                    progress(writer.tokens)
            writer.end_document()
            if writer.tokens == 0:
                raise UserError("the input holds no text: there is nothing to build a corpus from")
            manifest = writer.finish()
        tokenizer.save(folder / TOKENIZER)
        write_manifest(folder, manifest)
        os.rename(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    fsync_folder(output.parent)
    return manifest


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: what a container or taskset leaves us
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(files: Sequence[Path], jsonl_field: str) -> Iterator[list[Paragraph]]:
    batch: list[Paragraph] = []
    characters = 0
    for file in files:
        for paragraph in read_paragraphs(file, jsonl_field):
            batch.append(paragraph)
            characters += len(paragraph.text)
            if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PARAGRAPHS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[Paragraph], tokenizer: Tokenizer, threads: int, writer: "_Writer") -> None:
    encoded = tokenizer.encode_batch([paragraph.text for paragraph in batch], threads)
    for paragraph, ids in zip(batch, encoded, strict=True):
        if paragraph.starts_document:
            writer.end_document()
        writer.add(ids, len(paragraph.text.encode()))
    writer.flush()


class _HashedFile:
    """A new file whose checksum is known when its last byte is written."""

    def __init__(self, path: Path):
        self._file = open(path, "xb")  # noqa: SIM115 (stays open between calls)
        self._hash = hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        data = memoryview(array).cast("B")
        self._file.write(data)
        self._hash.update(data)

    def finish(self) -> str:
        """Put the bytes on disk, close the file, return the SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()


class _Writer:
    """The token stream and the document starts, on their way to disk."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int):
        self.tokens = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype_name(tokenizer.vocab_size)
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._documents = 0
        self._text_bytes = 0
        self._in_document = False
        self._pending: list[list[int]] = []  # since the last flush
        self._pending_starts: list[int] = []
        self._starts_file = _HashedFile(folder / DOCUMENTS)
        self._shards: list[Shard] = []
        self._shard_file: _HashedFile | None = None
        self._shard_filled = 0

    def close(self) -> None:
        """Let go of the files; to be called whether or not the build came to its end."""
        self._starts_file.close()
        if self._shard_file is not None:
            self._shard_file.close()

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Append a paragraph to the open document, opening one if none is."""
        if not ids:
            return
        if not self._in_document:
            self._pending_starts.append(self.tokens)
            self._append([self._tokenizer.bos_id])
            self._in_document = True
        self._append(ids)
        self._text_bytes += text_bytes

    def end_document(self) -> None:
        if self._in_document:
            self._append([self._tokenizer.eos_id])
            self._in_document = False

    def flush(self) -> None:
        """Write what has been added; to be called often enough to bound memory."""
        ids = np.fromiter(itertools.chain.from_iterable(self._pending), TOKEN_DTYPES[self._dtype])
        self._counts += np.bincount(ids, minlength=self._counts.size)
        starts = np.array(self._pending_starts, DOCUMENT_DTYPE)
        self._starts_file.write(starts)
        self._documents += starts.size
        self._pending, self._pending_starts = [], []
        while ids.size:
            if self._shard_file is None:
                path = self._folder / shard_name(len(self._shards))
                self._shard_file, self._shard_filled = _HashedFile(path), 0
            part = ids[: self._shard_tokens - self._shard_filled]
            self._shard_file.write(part)
            self._shard_filled += part.size
            if self._shard_filled == self._shard_tokens:
                self._finish_shard()
            ids = ids[part.size :]

    def finish(self) -> Manifest:
        """Write the rest and return the manifest."""
        self.flush()
        if self._shard_file is not None:
            self._finish_shard()
        return Manifest(
            documents=self._documents,
            tokens=self.tokens,
            text_bytes=self._text_bytes,
            dtype=self._dtype,
            vocab_size=self._tokenizer.vocab_size,
            tokenizer_sha256=self._tokenizer.sha256,
            documents_sha256=self._starts_file.finish(),
            unigram_entropy_nats=unigram_entropy(self._counts, self._tokenizer.special_ids),
            shards=tuple(self._shards),
        )

    def _append(self, ids: list[int]) -> None:
        self._pending.append(ids)
        self.tokens += len(ids)

    def _finish_shard(self) -> None:
        self._shards.append(Shard(self._shard_filled, self._shard_file.finish()))
        self._shard_file = None


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
