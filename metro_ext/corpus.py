"""A corpus: documents as one stream of token ids on disk, mapped, never loaded whole.

python -m metro_ext.corpus build TEXT... --tokenizer FILE.model --output DIR
python -m metro_ext.corpus info DIR [--verify]
python -m metro_ext.corpus info DIR=WEIGHT DIR=WEIGHT...
"""

import argparse
import bisect
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from metro_ext.atomic import sha256_file
from metro_ext.command_line import at_least, run
from metro_ext.corpus_build import DEFAULT_SHARD_TOKENS, build_corpus, work_folder
from metro_ext.corpus_format import (
    COUNTS,
    DOCUMENT_DTYPE,
    DOCUMENTS,
    ITEM_BYTES,
    TOKEN_DTYPES,
    TOKENIZER,
    Manifest,
    read_manifest,
    shard_name,
)
from metro_ext.corpus_plan import PLAN
from metro_ext.errors import UserError
from metro_ext.mixture import Mixture, split_weight
from metro_ext.text_files import FIELD_HELP
from metro_ext.tokenizer import Tokenizer

_CHUNK_TOKENS = 1 << 22  # what a pass over the whole corpus holds at a time


class Corpus:
    """A read-only corpus folder; `Corpus.open` makes one.

    Attributes:
        folder: where it lies.
        manifest: its figures.
        tokenizer: the tokenizer of its ids.
    """

    def __init__(self, folder: Path, manifest: Manifest, tokenizer: Tokenizer):
        self.folder = folder
        self.manifest = manifest
        self.tokenizer = tokenizer
        dtype = TOKEN_DTYPES[manifest.dtype]
        self._shards = [
            np.memmap(folder / shard_name(i), dtype, mode="r", shape=(shard.tokens,))
            for i, shard in enumerate(manifest.shards)
        ]
        self._starts = [
            0,
            *itertools.accumulate(shard.tokens for shard in manifest.shards),
        ]  # of each shard in the stream, and the end
        self._documents = np.memmap(
            folder / DOCUMENTS, DOCUMENT_DTYPE, mode="r", shape=(manifest.documents,)
        )

    @classmethod
    def open(cls, folder: str | os.PathLike, tokenizer: Tokenizer | None = None) -> "Corpus":
        """Map a corpus folder. Sizes are checked here, checksums by `verify`.

        Args:
            folder: made by `build_corpus`.
            tokenizer: the one that the caller is going to use, checked against the corpus's.

        Raises:
            UserError: no corpus, a missing file or one of the wrong size, another tokenizer.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        item = ITEM_BYTES[manifest.dtype]
        for i, shard in enumerate(manifest.shards):
            _check_size(folder / shard_name(i), shard.tokens * item)
        _check_size(folder / DOCUMENTS, manifest.documents * np.dtype(DOCUMENT_DTYPE).itemsize)
        if manifest.counts_sha256:
            _check_size(folder / COUNTS, manifest.vocab_size * 8)
        if not (folder / TOKENIZER).is_file():
            raise UserError(f"{folder / TOKENIZER}: the file is missing: build the corpus again")
        own = Tokenizer.load(folder / TOKENIZER)
        if (own.sha256, own.vocab_size) != (
            manifest.tokenizer_sha256,
            manifest.vocab_size,
        ):
            raise UserError(
                f"{folder / TOKENIZER}: not the tokenizer that made the shards (expected sha256 "
                f"{manifest.tokenizer_sha256}, found {own.sha256}): build the corpus again"
            )
        if tokenizer is not None and tokenizer.sha256 != own.sha256:
            raise UserError(
                f"{folder}: made with another tokenizer (expected sha256 {tokenizer.sha256}, "
                f"found {own.sha256}): build the corpus again with the tokenizer in use"
            )
        return cls(folder, manifest, own)

    @property
    def sha256(self) -> str:
        """Of the tokens, the document borders and the tokenizer, from the manifest's checksums."""
        manifest = self.manifest
        parts = [manifest.tokenizer_sha256, manifest.documents_sha256]
        parts += [shard.sha256 for shard in manifest.shards]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def __len__(self) -> int:
        """Tokens in the stream."""
        return self.manifest.tokens

    def tokens(self, start: int, length: int) -> np.ndarray:
        """A stretch of the token stream, across shard borders.

        Args:
            start, length: with 0 <= start and start + length <= len(self).

        Returns:
            A copy, uint16 or uint32 [length].

        Raises:
            UserError: an id lies outside the vocabulary, so that the shard is damaged.
        """
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"tokens {start}:{start + length} of a corpus of {len(self)}")
        result = np.empty(length, TOKEN_DTYPES[self.manifest.dtype])
        filled = 0
        shard = bisect.bisect_right(self._starts, start) - 1
        while filled < length:
            begin = start + filled - self._starts[shard]
            part = self._shards[shard][begin : begin + length - filled]
            result[filled : filled + part.size] = part
            self._check_ids(part, shard, begin)
            filled += part.size
            shard += 1
        return result

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, `<s>` and `</s>` included."""
        if not 0 <= index < self.manifest.documents:
            raise IndexError(f"document {index} of a corpus of {self.manifest.documents}")
        start = int(self._documents[index])
        last = index + 1 == self.manifest.documents
        end = len(self) if last else int(self._documents[index + 1])
        if not 0 <= start < end <= len(self):
            raise UserError(
                f"{self.folder / DOCUMENTS}: damaged: document {index} is at tokens {start} to "
                f"{end} of {len(self)}: build the corpus again"
            )
        return self.tokens(start, end - start)

    def document_at(self, position: int) -> int:
        """Number of the document that holds the token at a position of the stream."""
        return int(np.searchsorted(self._documents, position, side="right")) - 1

    def unigram_counts(self) -> np.ndarray:
        """How often each id occurs, special ones included: int64 [vocab_size].

        They are read from the folder, or, for a corpus of format version 1, counted.

        Raises:
            UserError: the counts do not add up to the tokens, or a shard is damaged.
        """
        if not self.manifest.counts_sha256:
            return self._count()
        counts = np.fromfile(self.folder / COUNTS, "<i8")
        if counts.min() < 0 or int(counts.sum()) != len(self):
            raise UserError(
                f"{self.folder / COUNTS}: damaged: expected counts that add up to {len(self)}, "
                f"found {int(counts.sum())}: build the corpus again"
            )
        return counts

    def _count(self) -> np.ndarray:
        counts = np.zeros(self.manifest.vocab_size, np.int64)
        for _, chunk in self._chunks():
            counts += np.bincount(chunk, minlength=counts.size)
        return counts

    def verify(self) -> None:
        """Check every checksum, every id and every document's start, in constant memory.

        Raises:
            UserError: names the first damaged file.
        """
        for i, shard in enumerate(self.manifest.shards):
            _check_sha256(self.folder / shard_name(i), shard.sha256)
        _check_sha256(self.folder / DOCUMENTS, self.manifest.documents_sha256)
        if self.manifest.counts_sha256:
            _check_sha256(self.folder / COUNTS, self.manifest.counts_sha256)
            if not np.array_equal(self._count(), self.unigram_counts()):
                raise UserError(
                    f"{self.folder / COUNTS}: its counts are not those of the shards: build the "
                    "corpus again"
                )
        bos = self.tokenizer.bos_id
        found = 0
        for start, chunk in self._chunks():
            borders = np.flatnonzero(chunk == bos) + start
            recorded = self._documents[found : found + borders.size]
            if not np.array_equal(borders, recorded):
                raise UserError(
                    f"{self.folder / DOCUMENTS}: its document starts are not where the shards "
                    "have them: build the corpus again"
                )
            found += borders.size
        if found != self.manifest.documents:
            raise UserError(
                f"{self.folder / DOCUMENTS}: expected {self.manifest.documents} documents, the "
                f"shards hold {found}: build the corpus again"
            )

    def _check_ids(self, ids: np.ndarray, shard: int, begin: int) -> None:
        if ids.size and int(ids.max()) >= self.manifest.vocab_size:
            where = int(np.argmax(ids >= self.manifest.vocab_size))
            raise UserError(
                f"{self.folder / shard_name(shard)}: damaged: expected ids below "
                f"{self.manifest.vocab_size}, found {int(ids[where])} at token {begin + where}: "
                "build the corpus again"
            )

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(self), _CHUNK_TOKENS):
            yield start, self.tokens(start, min(_CHUNK_TOKENS, len(self) - start))


def unigram_cross_entropy(
    counts: np.ndarray, heldout_counts: np.ndarray, special_ids: Sequence[int]
) -> float:
    """Loss, in nats a token, of the unigram model of one corpus on another.

    The model is the add-one estimate p(i) = (counts[i] + 1) / sum_j (counts[j] + 1) over the
    non-special ids: what a model that learned token frequencies and nothing else would score.

    Args:
        counts, heldout_counts: int64 [vocab_size], of the text trained on and of the text scored.
        special_ids: ids to leave out of both.
    """
    smoothed = np.delete(counts, special_ids).astype(np.float64) + 1
    heldout = np.delete(heldout_counts, special_ids).astype(np.float64)
    return float(heldout @ (np.log(smoothed.sum()) - np.log(smoothed)) / heldout.sum())


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path}: the file is missing: build the corpus again")
    found = path.stat().st_size
    if found != expected:
        kind = "truncated" if found < expected else "too long"
        raise UserError(
            f"{path}: {kind}: expected {expected} bytes, found {found}: build the corpus again"
        )


def _check_sha256(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise UserError(
            f"{path}: damaged: expected sha256 {expected}, found {found}: build the corpus again"
        )


def _build(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    live = sys.stderr.isatty()

    def show(tokens: int, share: float) -> None:
        rate = tokens / (time.monotonic() - started)
        print(f"\r{share:6.1%} {tokens:,} tokens, {rate:,.0f} tokens/s", end="", file=sys.stderr)

    work = work_folder(Path(arguments.output))
    if (work / PLAN).exists():
        print(f"going on with the build in {work}", file=sys.stderr)

    try:
        manifest = build_corpus(
            arguments.inputs,
            Tokenizer.load(arguments.tokenizer),
            arguments.output,
            shard_tokens=arguments.shard_tokens,
            field=arguments.field,
            workers=arguments.workers,
            dedup=arguments.dedup,
            progress=show if live else None,
        )
    finally:
        if live:
            print(file=sys.stderr)
    seconds = time.monotonic() - started
    dropped = ""
    if manifest.duplicates is not None:
        dropped = f" ({manifest.duplicates:,} duplicates left out)"
    print(
        f"{arguments.output}: {manifest.documents:,} documents{dropped}, {manifest.tokens:,} "
        f"tokens in {len(manifest.shards)} shard(s), {seconds:.1f} s, "
        f"{manifest.tokens / seconds:,.0f} tokens/s"
    )


def _info(arguments: argparse.Namespace) -> None:
    paths, weights = zip(*map(split_weight, arguments.corpora), strict=True)
    corpora = [Corpus.open(path) for path in paths]
    if len(corpora) == 1:
        _print_figures(corpora[0])
    else:
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(corpora):
            raise UserError("expected a weight for each corpus or for none")
        print(*Mixture.of(corpora, given or None).describe(), sep="\n")
    if arguments.verify:
        for corpus in corpora:
            corpus.verify()
        print(f"{'verified':<16}all checksums, ids and document starts are right")


def _print_figures(corpus: Corpus) -> None:
    manifest = corpus.manifest
    tokenizer = corpus.tokenizer
    rows = {
        "documents": f"{manifest.documents:,}",
        "duplicates": "not looked for"
        if manifest.duplicates is None
        else f"{manifest.duplicates:,} left out",
        "tokens": f"{manifest.tokens:,}",
        "text bytes": f"{manifest.text_bytes:,}",
        "bytes a token": f"{manifest.text_bytes / manifest.tokens:.2f}",
        "shards": f"{len(manifest.shards)} ({manifest.dtype})",
        "vocabulary": f"{manifest.vocab_size} ({'cased' if tokenizer.cased else 'uncased'})",
        "tokenizer": f"sha256 {manifest.tokenizer_sha256}",
        "unigram entropy": f"{manifest.unigram_entropy_nats:.4f} nats a token",
    }
    for name, value in rows.items():
        print(f"{name:<16}{value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.corpus",
        description="Build and look at corpora of token ids.",
    )
    commands = parser.add_subparsers(required=True, metavar="build|info")

    build = commands.add_parser("build", help="encode text files into a corpus folder")
    build.add_argument("inputs", nargs="+", metavar="INPUT", help="text file or folder")
    build.add_argument("--tokenizer", required=True, metavar="FILE")
    build.add_argument("--output", required=True, metavar="DIR", help="the folder to make")
    build.add_argument("--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, metavar="N")
    build.add_argument("--field", default="text", metavar="NAME", help=FIELD_HELP)
    build.add_argument(
        "--workers", type=at_least(1), metavar="N", help="processes (default: all cores)"
    )
    build.add_argument(
        "--dedup", action="store_true", help="keep only the first of documents with the same text"
    )
    build.set_defaults(command=_build)

    info = commands.add_parser("info", help="print a corpus's figures, or the shares of several")
    info.add_argument("corpora", nargs="+", metavar="DIR[=WEIGHT]")
    info.add_argument("--verify", action="store_true", help="check every checksum and every id")
    info.set_defaults(command=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    arguments.command(arguments)


if __name__ == "__main__":
    run(main)
