"""Packed batches: a pure function of (corpus, seed, index).

An epoch is a walk over the corpus's token stream, taken as a ring and cut into windows of
`sequence_length` tokens. Each epoch has its own cut (a seeded offset) and its own order (a seeded
permutation, evaluated at one point in constant time), so any batch can be made at once and a run
resumes at any step without replaying what came before.

Documents are kept apart: a window that crosses a document border gives one sequence a document.
Every sequence is `<s> ... </s>`; where the cut goes through a document, its first and last token
give way to them. A piece of one or two tokens has no room for content and is left out; the tokens
that are missing for it are padding at the end of the batch.

Where documents are so short that this would cost a training batch over 1 % (`reads_on`), it reads
on behind its last window, and at most two of its tokens are padding.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from metro_ext.corpus import Corpus
from metro_ext.errors import UserError
from metro_ext.mixture import Mixture
from metro_ext.tokenizer import BOS_ID, EOS_ID, PAD_ID

# MPNet's convention: position 1 marks padding, the first token of a sequence has position 2; so a
# model's position table has sequence_length + 2 rows.
PAD_POSITION = 1
FIRST_POSITION = 2

MIN_SEQUENCE = 3  # <s>, one token, </s>
MOST_PADDING = 0.01  # of a training batch; where cuts alone would cost more, it reads on

_FEISTEL_ROUNDS = 6
_U64 = (1 << 64) - 1


@dataclasses.dataclass(frozen=True, eq=False)  # == on tensors has no truth value
class Batch:
    """One packed batch on the CPU; T is tokens_per_batch.

    Attributes:
        tokens: int64 [T], ids; the padding, if any, is at the end.
        positions: int64 [T], place in the sequence + 2, or 1 for padding.
        cu_seqlens: int32 [max_sequences(T) + 1], where each sequence starts, then T for ever: the
            entries beyond the last sequence describe sequences of no tokens, so that the shape
            does not depend on the text. Padding counts as sequences of its own.
        max_seqlen: no sequence is longer; the source's sequence_length.
        index: which batch of the source this is.
        seed: int64 [] for every random draw made on this batch.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    index: int
    seed: torch.Tensor


class Source(Protocol):
    """What makes batches by index."""

    def batch(self, index: int) -> Batch: ...


def max_sequences(tokens_per_batch: int) -> int:
    """The most sequences that a packed batch can hold.

    Real sequences have at least 3 tokens and padding is cut into sequences of sequence_length >= 3
    tokens and at most one shorter one: r / 3 + ceil(p / 3) <= T / 3 + 1 for r + p = T.
    """
    return tokens_per_batch // MIN_SEQUENCE + 1


def reads_on(corpus: Corpus, sequence_length: int) -> bool:
    """Whether the batches of a corpus read on; it follows from the corpus and the length alone.

    A cut anywhere in a document of n >= 3 tokens leaves out, summed over its n places, 6 tokens:
    the pieces of 1 and 2 tokens on either side. A window has one cut.
    """
    mean = len(corpus) / corpus.manifest.documents  # above the window: nearly all are one piece
    return mean <= sequence_length and 6 / mean > MOST_PADDING * sequence_length


def micro_batch_index(
    step: int, micro: int, rank: int, world_size: int = 1, accumulation: int = 1
) -> int:
    """Which batch a rank takes in micro-step `micro` of step `step`.

    The batches of one step are step * accumulation * world_size and the following ones, so the
    global batch depends on accumulation * world_size alone, not on how it is shared out.
    """
    return (step * accumulation + micro) * world_size + rank


class BatchSource:
    """Batches for training: shuffled windows, epoch after epoch without end."""

    def __init__(self, corpus: Corpus, tokens_per_batch: int, sequence_length: int, seed: int):
        """Take windows of a corpus.

        Args:
            corpus: the text.
            tokens_per_batch: T, a multiple of sequence_length.
            sequence_length: tokens a window, at least 3.
            seed: of the order, the cuts and every batch's own seed.

        Raises:
            UserError: sizes that do not fit each other or the corpus.
        """
        _check_sizes(corpus, tokens_per_batch, sequence_length, needed=sequence_length)
        self.corpus = corpus
        self.tokens_per_batch = tokens_per_batch
        self.sequence_length = sequence_length
        self.seed = seed
        self.windows_per_batch = tokens_per_batch // sequence_length
        self.windows_per_epoch = len(corpus) // sequence_length
        self.reads_on = reads_on(corpus, sequence_length)

    def batch(self, index: int) -> Batch:
        """Batch number `index` >= 0.

        Raises:
            UserError: a damaged shard.
        """
        if index < 0:
            raise IndexError(f"batch {index}: the first batch is 0")
        first = index * self.windows_per_batch
        windows = [self.window(first + i) for i in range(self.windows_per_batch)]
        more = functools.partial(self.behind, first + self.windows_per_batch - 1)
        seed = _mix(self.seed, index, _BATCH_SEED)
        return _pack(np.stack(windows), index, seed, more if self.reads_on else None)

    def behind(self, number: int, missing: int) -> np.ndarray:
        """Text behind a window that packs to `missing` tokens: windows [N, sequence_length]."""
        start = self.window_start(number) + self.sequence_length
        count = 1 + 2 * missing // self.sequence_length  # a window of 8 or more loses half at most
        starts = range(start, start + count * self.sequence_length, self.sequence_length)
        return np.stack([self._read(place % len(self.corpus)) for place in starts])

    def window(self, number: int) -> np.ndarray:
        """The tokens of the window of that number, counted over epochs: [sequence_length]."""
        return self._read(self.window_start(number))

    def window_start(self, number: int) -> int:
        """Where in the token stream the window of that number, counted over epochs, starts."""
        epoch, place = divmod(number, self.windows_per_epoch)
        window = permute(place, self.windows_per_epoch, _mix(self.seed, epoch, _ORDER))
        offset = _mix(self.seed, epoch, _OFFSET) % len(self.corpus)
        return (offset + window * self.sequence_length) % len(self.corpus)

    def documents(self, index: int) -> list[int]:
        """Numbers of the corpus's documents that batch `index` has windows of, in order."""
        first = index * self.windows_per_batch
        numbers = range(first, first + self.windows_per_batch)
        return sorted(set().union(*map(self.documents_of, numbers)))

    def documents_of(self, number: int) -> set[int]:
        """Numbers of the documents that the window of that number is from."""
        found: set[int] = set()
        start = self.window_start(number)
        end = start + self.sequence_length
        for first, last in ((start, min(end, len(self.corpus))), (0, end - len(self.corpus))):
            if first < last:
                documents = (self.corpus.document_at(p) for p in (first, last - 1))
                found.update(range(next(documents), next(documents) + 1))
        return found

    def _read(self, start: int) -> np.ndarray:
        """One window of the ring; the end of the stream ends a document, so wrapping is safe."""
        head = min(self.sequence_length, len(self.corpus) - start)
        tokens = self.corpus.tokens(start, head)
        if head < self.sequence_length:
            rest = self.corpus.tokens(0, self.sequence_length - head)
            tokens = np.concatenate([tokens, rest])
        return tokens


class MixtureSource:
    """Batches for training from several corpora: each window comes from one of them.

    Every corpus is walked through epoch by epoch in an order of its own, at the pace of its share.
    """

    def __init__(
        self, mixture: Mixture[Corpus], tokens_per_batch: int, sequence_length: int, seed: int
    ):
        """Take windows of a mixture; the other arguments and errors are those of `BatchSource`."""
        self.mixture = mixture
        self.seed = seed
        self.windows_per_batch = tokens_per_batch // sequence_length
        self._sources = [
            BatchSource(corpus, tokens_per_batch, sequence_length, _mix(seed, i, _COMPONENT))
            for i, corpus in enumerate(mixture.corpora)
        ]
        self.reads_on = any(source.reads_on for source in self._sources)

    def batch(self, index: int) -> Batch:
        """Batch number `index` >= 0.

        Raises:
            UserError: a damaged shard.
        """
        if index < 0:
            raise IndexError(f"batch {index}: the first batch is 0")
        first = index * self.windows_per_batch
        places = [self.mixture.place(first + i) for i in range(self.windows_per_batch)]
        windows = [self._sources[which].window(number) for which, number in places]
        last, number = places[-1]
        more = functools.partial(self._sources[last].behind, number)
        seed = _mix(self.seed, index, _BATCH_SEED)
        return _pack(np.stack(windows), index, seed, more if self.reads_on else None)

    def documents(self, index: int) -> dict[str, list[int]]:
        """As that of `BatchSource`, by the corpora's folders."""
        first = index * self.windows_per_batch
        found: dict[str, set[int]] = {}
        for place in range(first, first + self.windows_per_batch):
            which, number = self.mixture.place(place)
            source = self._sources[which]
            found.setdefault(str(source.corpus.folder), set()).update(source.documents_of(number))
        return {folder: sorted(numbers) for folder, numbers in found.items()}


def training_source(
    mixture: Mixture[Corpus], tokens_per_batch: int, sequence_length: int, seed: int
) -> BatchSource | MixtureSource:
    """The source of a run's batches: of one corpus those that `BatchSource` makes of it."""
    if len(mixture.corpora) == 1:
        return BatchSource(mixture.corpora[0], tokens_per_batch, sequence_length, seed)
    return MixtureSource(mixture, tokens_per_batch, sequence_length, seed)


class EvaluationSource:
    """Batches of a held-out corpus in the order of its text, each window once.

    The tokens beyond the last full batch are left out, so that every batch has the same number of
    tokens to score.
    """

    def __init__(self, corpus: Corpus, tokens_per_batch: int, sequence_length: int, seed: int = 0):
        """Take windows of a corpus; the arguments are those of `BatchSource`.

        Raises:
            UserError: sizes that do not fit, or a corpus smaller than one batch.
        """
        _check_sizes(corpus, tokens_per_batch, sequence_length, needed=tokens_per_batch)
        self.corpus = corpus
        self.tokens_per_batch = tokens_per_batch
        self.sequence_length = sequence_length
        self.seed = seed

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.corpus) // self.tokens_per_batch

    def batch(self, index: int) -> Batch:
        """Batch number `index` < len(self)."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        tokens = self.corpus.tokens(index * self.tokens_per_batch, self.tokens_per_batch)
        windows = tokens.reshape(-1, self.sequence_length)
        return _pack(windows, index, _mix(self.seed, index, _EVALUATION_SEED))


def evaluation_batches(
    corpus: Corpus, tokens_per_batch: int, sequence_length: int, seed: int = 0
) -> Iterator[Batch]:
    """All batches of an `EvaluationSource`, in order."""
    source = EvaluationSource(corpus, tokens_per_batch, sequence_length, seed)
    return (source.batch(i) for i in range(len(source)))


def prefetch(
    source: Source, indices: Iterable[int], depth: int = 2
) -> Generator[Batch, None, None]:
    """The batches of the given indices, made ahead on one background thread.

    An exception in making a batch is raised where that batch would have come. Closing the
    generator, or leaving it to the garbage collector, ends the thread.

    Args:
        source: where batches come from.
        indices: which, in order; may be endless.
        depth: how many batches may wait, at least 1.
    """
    if depth < 1:
        raise ValueError(f"prefetch: expected a depth of at least 1, found {depth}")
    waiting: collections.deque[Future[Batch]] = collections.deque()
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    try:
        for index in indices:
            waiting.append(worker.submit(source.batch, index))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        worker.shutdown(wait=True, cancel_futures=True)


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under a permutation of range(size) chosen by `key`.

    A balanced Feistel network permutes the smallest even number of bits that holds the range;
    results outside it are sent through again (cycle walking: Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002), fewer than four times on average. No table, constant memory.
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(key, right, round_number) & mask)
        index = left << half | right
        if index < size:
            return index


# What a hash is drawn for, so that no two uses share a stream.
_ORDER, _OFFSET, _BATCH_SEED, _EVALUATION_SEED, _COMPONENT = range(0x100, 0x105)


def _mix(*words: int) -> int:
    """A 64-bit hash of integers: the finaliser of splitmix64 (Steele et al., 2014), chained."""
    state = 0
    for word in words:
        state = (state ^ (word & _U64)) + 0x9E3779B97F4A7C15 & _U64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _U64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _U64
        state ^= state >> 31
    return state


def _check_sizes(corpus: Corpus, tokens_per_batch: int, sequence_length: int, needed: int) -> None:
    if sequence_length < MIN_SEQUENCE:
        raise UserError(
            f"the sequence length must be at least {MIN_SEQUENCE}, found {sequence_length}"
        )
    if tokens_per_batch < 1 or tokens_per_batch % sequence_length:
        raise UserError(
            f"the tokens of a batch must be a multiple of the sequence length {sequence_length}, "
            f"found {tokens_per_batch}"
        )
    if len(corpus) < needed:
        raise UserError(
            f"{corpus.folder}: the corpus has {len(corpus)} tokens, at least {needed} are needed: "
            "give it more text, or use shorter sequences and smaller batches"
        )


def _pieces(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents' pieces in windows [W, L] that have room for content: tokens, and their lengths."""
    is_start = windows == BOS_ID
    is_start[:, 0] = True
    lengths = np.diff(np.flatnonzero(is_start), append=windows.size)
    keep = lengths >= MIN_SEQUENCE
    return windows.reshape(-1)[np.repeat(keep, lengths)].astype(np.int64), lengths[keep]


def _pack(
    windows: np.ndarray, index: int, seed: int, more: Callable[[int], np.ndarray] | None = None
) -> Batch:
    """Turn windows [W, L] into one packed batch; more: windows to take missing tokens from."""
    total, length = windows.size, windows.shape[1]
    tokens, lengths = _pieces(windows)
    if more is not None and total - tokens.size >= MIN_SEQUENCE:
        own, own_lengths = _pieces(more(total - tokens.size))
        ends = np.minimum(np.cumsum(np.concatenate([lengths, own_lengths])), total)
        lengths = np.diff(ends, prepend=0)
        lengths = lengths[lengths >= MIN_SEQUENCE]  # only the last ones can have become too short
        tokens = np.concatenate([tokens, own])[: lengths.sum()]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens[starts] = BOS_ID
    tokens[ends - 1] = EOS_ID
    positions = np.arange(tokens.size) - np.repeat(starts, lengths) + FIRST_POSITION

    padding = total - tokens.size
    cu_seqlens = np.full(max_sequences(total) + 1, total, np.int32)
    pad_starts = np.arange(tokens.size, total, length)
    sequence_starts = np.concatenate([starts, pad_starts])
    cu_seqlens[: sequence_starts.size] = sequence_starts
    return Batch(
        tokens=torch.from_numpy(np.pad(tokens, (0, padding), constant_values=PAD_ID)),
        positions=torch.from_numpy(np.pad(positions, (0, padding), constant_values=PAD_POSITION)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=length,
        index=index,
        # The hash is unsigned: its top bit is dropped to fit an int64 without a sign.
        seed=torch.tensor(seed >> 1, dtype=torch.int64),
    )
