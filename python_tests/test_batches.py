import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
import torch
from corpora import make_corpus, real_text, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from metro_ext.batches import (
    BatchSource,
    EvaluationSource,
    evaluation_batches,
    max_sequences,
    micro_batch_index,
    permute,
    prefetch,
)
from metro_ext.errors import UserError
from metro_ext.sample_text import sample_paths

PAD, BOS, EOS = 1, 0, 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of one to forty words and one long one, in shards of an odd size."""
    words = sample_paths()[1].read_text(encoding="utf-8").split()
    generator = np.random.default_rng(0)
    documents, place = [], 0
    while place < 3000:
        length = int(generator.integers(1, 41))
        documents.append(" ".join(words[place : place + length]))
        place += length
    documents.insert(20, " ".join(words[3000:6000]))
    folder = tmp_path_factory.mktemp("batches")
    return make_corpus(folder, documents, small_tokenizer(), shard_tokens=1009)


def sequences(batch):
    """The tokens of each sequence that is not empty."""
    borders = batch.cu_seqlens.tolist()
    tokens = batch.tokens.tolist()
    return [tokens[a:b] for a, b in itertools.pairwise(borders) if b > a]


def expected_sequences(windows):
    """The packing rule, spelled out a token at a time."""
    result = []
    for window in windows:
        pieces = [[]]
        for token in window:
            if token == BOS and pieces[-1]:
                pieces.append([])
            pieces[-1].append(token)
        result += [[BOS, *piece[1:-1], EOS] for piece in pieces if len(piece) >= 3]
    return result


def ring(corpus, start, length):
    stream = corpus.tokens(0, len(corpus)).tolist()
    return [stream[(start + i) % len(stream)] for i in range(length)]


@pytest.mark.parametrize(("total", "length"), [(256, 64), (96, 32), (128, 128), (60, 3)])
def test_a_batch_is_what_the_rule_says(corpus, total, length):
    source = BatchSource(corpus, total, length, seed=7)
    for index in [*range(40), 10**9]:
        batch = source.batch(index)
        first = index * source.windows_per_batch
        starts = [source.window_start(first + i) for i in range(source.windows_per_batch)]
        expected = expected_sequences([ring(corpus, start, length) for start in starts])
        found = sequences(batch)
        assert found[: len(expected)] == expected
        padding = found[len(expected) :]
        assert all(set(piece) == {PAD} and len(piece) <= length for piece in padding)
        assert sum(map(len, found)) == total
        assert batch.max_seqlen == length and batch.index == index


def test_shapes_and_types_are_static(corpus):
    source = BatchSource(corpus, 256, 64, seed=7)
    for index in range(20):
        batch = source.batch(index)
        assert (batch.tokens.dtype, batch.tokens.shape) == (torch.int64, (256,))
        assert (batch.positions.dtype, batch.positions.shape) == (torch.int64, (256,))
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.shape == (max_sequences(256) + 1,)
        assert (batch.seed.dtype, batch.seed.shape) == (torch.int64, ())
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == 256
        assert (batch.cu_seqlens.diff() >= 0).all()
        assert batch.tokens.is_contiguous() and batch.positions.is_contiguous()
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.index = 3


def test_positions_count_from_two_and_padding_has_one(corpus):
    seen_padding = 0
    source = BatchSource(corpus, 60, 3, seed=0)
    for index in range(50):
        batch = source.batch(index)
        for a, b in itertools.pairwise(batch.cu_seqlens.tolist()):
            positions = batch.positions[a:b].tolist()
            if b > a and batch.tokens[a] == PAD:
                assert positions == [1] * (b - a)
                seen_padding += 1
            else:
                assert positions == list(range(2, 2 + b - a))
    assert seen_padding > 0


def test_documents_stay_apart(corpus):
    """The inside of every sequence is a stretch of one document."""
    documents = [corpus.document(i).tolist() for i in range(corpus.manifest.documents)]
    text = ["," + ",".join(map(str, document)) + "," for document in documents]
    source = BatchSource(corpus, 256, 64, seed=3)
    for index in range(20):
        for sequence in sequences(source.batch(index)):
            if sequence[0] == PAD:
                continue
            assert sequence[0] == BOS and sequence[-1] == EOS
            inside = sequence[1:-1]
            assert inside and not {BOS, EOS, PAD} & set(inside)
            needle = "," + ",".join(map(str, inside)) + ","
            assert any(needle in document for document in text)


def test_an_epoch_visits_every_window_once(corpus):
    source = BatchSource(corpus, 64, 64, seed=11)
    n = source.windows_per_epoch
    assert n == len(corpus) // 64
    offsets, orders = set(), set()
    for epoch in range(4):
        starts = [source.window_start(epoch * n + i) for i in range(n)]
        covered = np.zeros(len(corpus), int)
        for start in starts:
            covered[(start + np.arange(64)) % len(corpus)] += 1
        assert covered.max() == 1 and covered.sum() == n * 64
        offsets.add(min((start - starts[0]) % 64 for start in starts) + starts[0] % 64)
        orders.add(tuple((start - starts[0]) % len(corpus) for start in starts))
    assert len(offsets) == len(orders) == 4  # each epoch has its own cut and its own order


def equal(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    )


def test_a_batch_depends_on_seed_and_index_alone(corpus):
    def source(seed):
        return BatchSource(corpus, 256, 64, seed=seed)

    used = source(5)
    forwards = [used.batch(i) for i in range(10)]
    for index in reversed(range(10)):
        assert equal(used.batch(index), forwards[index])
        assert equal(source(5).batch(index), forwards[index])
        assert not equal(source(6).batch(index), forwards[index])


def test_the_order_never_changes_between_releases(corpus):
    """A resumed run must meet the batches it would have met: these figures are a contract."""
    assert [permute(i, 10, key=1) for i in range(10)] == PERMUTATION_OF_TEN
    assert int(BatchSource(corpus, 256, 64, seed=5).batch(3).seed) == SEED_OF_BATCH_THREE


PERMUTATION_OF_TEN = [7, 1, 6, 3, 0, 5, 2, 9, 8, 4]
SEED_OF_BATCH_THREE = 5257069639888261857


def test_seeds_of_batches_differ(corpus):
    seeds = [
        int(BatchSource(corpus, 256, 64, seed=seed).batch(i).seed)
        for seed in (0, 1, 2, -1)
        for i in range(50)
    ]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0
    ones = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds]).mean(axis=0)
    assert abs(ones - 0.5).max() < 0.18  # 5 standard deviations of 200 coin tosses


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_are_uniform():
    """Every index goes to every place equally often over the keys: chi-square, 0.999 quantile."""
    size, keys = 12, 6000
    counts = np.zeros((size, size))
    pairs = np.zeros((size, size))
    for key in range(keys):
        images = [permute(i, size, key) for i in range(size)]
        counts[np.arange(size), images] += 1
        pairs[images[0], images[1]] += 1
    expected = keys / size
    # A doubly stochastic table: (size - 1)^2 = 121 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 173.6
    off_diagonal = pairs[~np.eye(size, dtype=bool)]
    expected = keys / off_diagonal.size
    assert ((off_diagonal - expected) ** 2 / expected).sum() < 185.9  # 131 degrees of freedom


def test_permute_large_ranges_without_a_table():
    size = 10**15 + 37
    images = [permute(i, size, key=3) for i in range(1000)]
    assert len(set(images)) == 1000 and min(images) >= 0 and max(images) < size
    assert abs(np.mean(images) / size - 0.5) < 0.05


def test_the_batches_of_a_step_do_not_depend_on_the_ranks():
    for step in range(3):
        expected = set(range(step * 8, step * 8 + 8))
        for world_size, accumulation in ((1, 8), (2, 4), (4, 2), (8, 1)):
            found = [
                micro_batch_index(step, micro, rank, world_size, accumulation)
                for micro in range(accumulation)
                for rank in range(world_size)
            ]
            assert len(found) == 8 and set(found) == expected
    assert micro_batch_index(5, 0, 0) == 5


def fill(source, batches):
    pads = sum(int((source.batch(i).tokens == PAD).sum()) for i in range(batches))
    return 1 - pads / (batches * source.tokens_per_batch)


@pytest.mark.parametrize("length", [64, 128, 512])
def test_fill_is_at_least_99_per_cent(corpus, length):
    """On documents of about twenty words, far shorter than a window."""
    assert fill(BatchSource(corpus, 4 * length, length, seed=1), 50) >= 0.99


@pytest.mark.parametrize("length", [128, 512])
def test_fill_on_real_text(tmp_path, length):
    corpus = make_corpus(tmp_path, [real_text("books-valid.txt.xz")], small_tokenizer())
    assert fill(BatchSource(corpus, 8 * length, length, seed=1), 50) >= 0.999


@pytest.mark.parametrize("words", [1, 2, 3, 5, 10])
@pytest.mark.parametrize(("total", "length"), [(256, 64), (1024, 128)])
def test_fill_on_documents_of_a_few_tokens(tmp_path, words, total, length):
    """At most two tokens of padding wherever cuts alone would cost more than a hundredth."""
    generator = np.random.default_rng(words)
    documents = [" ".join(["the"] * int(n)) for n in generator.integers(1, words + 1, 1500)]
    corpus = make_corpus(tmp_path, documents, small_tokenizer())
    source = BatchSource(corpus, total, length, seed=1)
    assert fill(source, 60) >= 0.99
    if source.reads_on:
        for index in range(60):
            batch = source.batch(index)
            assert int((batch.tokens == PAD).sum()) <= 2
            lengths = batch.cu_seqlens.diff()
            assert batch.cu_seqlens[-1] == total and lengths.max() <= length
            for piece in sequences(batch):
                assert PAD in piece or (piece[0] == BOS and piece[-1] == EOS and len(piece) >= 3)
    else:
        assert 6 * corpus.manifest.documents <= 0.01 * length * len(corpus)


@pytest.mark.parametrize(("total", "length"), [(60, 3), (60, 4), (60, 5), (64, 64), (240, 60)])
def test_the_most_sequences_fit(tmp_path, total, length):
    """Documents of one token each are the worst case; the bound is reached when 3 divides L."""
    tokenizer = small_tokenizer()
    assert len(tokenizer.encode("the")) == 1
    corpus = make_corpus(tmp_path, ["the"] * 300, tokenizer)
    most = 0
    source = BatchSource(corpus, total, length, seed=0)
    for index in range(60):
        batch = source.batch(index)
        assert batch.cu_seqlens[-1] == total  # the last entry is spare: never cut off
        assert sum(map(len, sequences(batch))) == total
        most = max(most, len(sequences(batch)))
    assert most <= max_sequences(total)
    if length % 3 == 0:
        assert most >= total // 3


def test_evaluation_reads_the_text_in_order_and_once(corpus):
    batches = list(evaluation_batches(corpus, 256, 64))
    assert len(batches) == len(EvaluationSource(corpus, 256, 64)) == len(corpus) // 256
    stream = corpus.tokens(0, len(corpus)).tolist()
    for index, batch in enumerate(batches):
        windows = [stream[index * 256 + i : index * 256 + i + 64] for i in range(0, 256, 64)]
        expected = expected_sequences(windows)
        assert sequences(batch)[: len(expected)] == expected
        assert batch.index == index
    for batch, again in zip(batches, evaluation_batches(corpus, 256, 64), strict=True):
        assert equal(batch, again)
    with pytest.raises(IndexError):
        EvaluationSource(corpus, 256, 64).batch(len(batches))


@pytest.mark.parametrize("make", [BatchSource, EvaluationSource])
def test_sizes_that_do_not_fit_are_refused(corpus, make):
    with pytest.raises(UserError, match="multiple of the sequence length 64, found 100"):
        make(corpus, 100, 64, 0)
    with pytest.raises(UserError, match="multiple of the sequence length 64, found 0"):
        make(corpus, 0, 64, 0)
    with pytest.raises(UserError, match="at least 3, found 2"):
        make(corpus, 64, 2, 0)
    with pytest.raises(UserError, match=r"the corpus has \d+ tokens, at least 65536 are needed"):
        make(corpus, 65536, 65536, 0)


def test_a_corpus_of_exactly_one_window(tmp_path):
    corpus = make_corpus(tmp_path, ["the the the"], small_tokenizer())
    assert len(corpus) == 5
    source = BatchSource(corpus, 15, 5, seed=0)
    for index in range(20):
        assert sum(map(len, sequences(source.batch(index)))) == 15


def test_prefetch_gives_the_same_batches_in_order(corpus):
    source = BatchSource(corpus, 256, 64, seed=2)
    indices = [5, 1, 1, 9, 0]
    for depth in (1, 2, 10):
        for index, batch in zip(indices, prefetch(source, indices, depth), strict=True):
            assert equal(batch, source.batch(index))
    assert list(prefetch(source, [], 2)) == []
    with pytest.raises(ValueError, match="depth"):
        next(prefetch(source, [0], 0))


class Recorder:
    """A source that notes what it was asked for and fails at one index."""

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def batch(self, index):
        self.asked.append(index)
        if index == self.fails_at:
            raise UserError(f"batch {index} is damaged")
        return index


def batch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_prefetch_raises_where_the_batch_would_have_come():
    stream = prefetch(Recorder(fails_at=3), range(10), depth=4)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="batch 3 is damaged"):
        next(stream)
    assert not batch_threads()


def test_prefetch_runs_ahead_by_its_depth_and_stops_when_closed():
    recorder = Recorder()
    stream = prefetch(recorder, itertools.count(), depth=3)
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(recorder.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert recorder.asked == [0, 1, 2, 3]
    assert batch_threads()
    stream.close()
    assert not batch_threads()
    assert recorder.asked == [0, 1, 2, 3]
