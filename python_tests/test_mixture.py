"""Mixtures of corpora: exact shares, a pure function of seed and index, documents kept apart."""

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from corpora import exit_code, make_corpus, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from training_runs import train

from metro_ext import corpus as corpus_module
from metro_ext.batches import BatchSource, MixtureSource, training_source
from metro_ext.config import load_config
from metro_ext.errors import UserError
from metro_ext.mixture import Mixture, split_weight
from metro_ext.monitor import read_records
from metro_ext.prepare import prepare
from metro_ext.sample_text import sample_paths

BOS, PAD, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three corpora that share no document; of the first and last, no word."""
    words = sorted(set(sample_paths()[1].read_text(encoding="utf-8").lower().split()))
    folder = tmp_path_factory.mktemp("mixture")
    found = []
    for name, stock, count in (("a", words[::2], 300), ("b", words[1::2], 90), ("c", ["zz"], 500)):
        generator = np.random.default_rng(len(stock))
        documents = [
            " ".join(generator.choice(stock, size=int(generator.integers(1, 40))))
            for _ in range(count)
        ]
        found.append(make_corpus(folder / name, documents, small_tokenizer(), shard_tokens=1009))
    return found


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any), st.integers(0, 10**12))
def test_shares_are_exact_and_windows_counted(weights, start):
    """From the first window on, and far out, against counting one by one."""
    mixture = Mixture((None,) * len(weights), tuple(weights))
    seen = [0] * len(weights)
    for number in range(3 * sum(weights)):
        which, before = mixture.place(number)
        assert before == seen[which]
        seen[which] += 1
        for i, (count, weight) in enumerate(zip(seen, weights, strict=True)):
            assert abs(count - (number + 1) * weight / sum(weights)) < 1 + i
    assert seen == [3 * weight for weight in weights]
    far = [mixture.place(start + i) for i in range(sum(weights))]
    for index in range(len(weights)):
        numbers = [before for which, before in far if which == index]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True


def test_weights_are_exact_decimals(corpora):
    weights = [split_weight(f"x={text}")[1] for text in ("0.7", "0.2", "1e-1")]
    assert Mixture.of(corpora, weights).weights == (7, 2, 1)
    sizes = [len(corpus) for corpus in corpora]
    assert Mixture.of(corpora).shares == pytest.approx([size / sum(sizes) for size in sizes])


def sequences(batch):
    borders, tokens = batch.cu_seqlens.tolist(), batch.tokens.tolist()
    return [tokens[a:b] for a, b in itertools.pairwise(borders) if b > a]


def test_windows_are_those_of_the_corpora_and_documents_stay_apart(corpora):
    mixture = Mixture.of(corpora, [Fraction(5), Fraction(2), Fraction(1)])
    source = MixtureSource(mixture, 256, 64, seed=3)
    texts = []
    for corpus in corpora:
        documents = (corpus.document(i).tolist() for i in range(corpus.manifest.documents))
        texts += [",".join(map(str, ["", *document, ""])) for document in documents]
    for index in range(20):
        for sequence in sequences(source.batch(index)):
            if sequence[0] != PAD:
                assert (sequence[0], sequence[-1]) == (BOS, EOS)
                needle = ",".join(map(str, ["", *sequence[1:-1], ""]))
                assert any(needle in text for text in texts)


def test_each_corpus_is_walked_through_once_an_epoch(corpora):
    mixture = Mixture.of(corpora, [Fraction(1), Fraction(3), Fraction(0)])
    source = MixtureSource(mixture, 64, 64, seed=9)
    epochs = len(corpora[1]) // 64
    starts = []
    for number in range(4 * epochs):
        which, before = mixture.place(number)
        assert which != 2
        if which == 1 and before < epochs:
            starts.append(source._sources[1].window_start(before))
    covered = np.zeros(len(corpora[1]), int)
    for start in starts:
        covered[(start + np.arange(64)) % covered.size] += 1
    assert len(starts) == epochs and covered.max() == 1


def equal(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    )


def test_a_batch_depends_on_seed_and_index_alone(corpora):
    mixture = Mixture.of(corpora)
    used = MixtureSource(mixture, 256, 64, seed=5)
    forwards = [used.batch(i) for i in range(8)]
    for index in reversed(range(8)):
        assert equal(used.batch(index), forwards[index])
        assert equal(MixtureSource(mixture, 256, 64, seed=5).batch(index), forwards[index])
        assert not equal(MixtureSource(mixture, 256, 64, seed=6).batch(index), forwards[index])
    assert equal(used.batch(10**12), MixtureSource(mixture, 256, 64, seed=5).batch(10**12))
    with pytest.raises(IndexError):
        used.batch(-1)


def test_a_mixture_of_one_is_that_corpus(corpora):
    source = training_source(Mixture.of(corpora[:1]), 256, 64, 5)
    assert equal(source.batch(7), BatchSource(corpora[0], 256, 64, 5).batch(7))


@pytest.mark.parametrize("length", [64, 128])
def test_fill_is_at_least_99_per_cent(corpora, length):
    source = MixtureSource(Mixture.of(corpora), 4 * length, length, seed=1)
    pads = sum(int((source.batch(i).tokens == PAD).sum()) for i in range(40))
    assert pads <= 0.01 * 40 * 4 * length


def test_unigram_counts_are_weighted(corpora):
    mixture = Mixture.of(corpora[:2], [Fraction(1), Fraction(3)])
    counts = mixture.unigram_counts()
    p = [corpus.unigram_counts() / len(corpus) for corpus in corpora[:2]]
    np.testing.assert_allclose(counts / counts.sum(), 0.25 * p[0] + 0.75 * p[1], rtol=1e-12)
    assert counts.sum() == pytest.approx(len(mixture))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("web=0.7", ("web", Fraction(7, 10))),
        ("a=b=3", ("a=b", Fraction(3))),
        ("web", ("web", None)),
        ("web=-1", ("web", Fraction(-1))),
    ],
)
def test_entries(entry, expected):
    assert split_weight(entry) == expected


@pytest.mark.parametrize("entry", ["web=much", "web=", "=3", "web=nan", "web=inf"])
def test_entries_that_are_none(entry):
    with pytest.raises(UserError, match="expected PATH or PATH=WEIGHT, found"):
        split_weight(entry)


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    (tmp_path / "a=3").write_text("x")
    assert split_weight(str(tmp_path / "a=3")) == (str(tmp_path / "a=3"), None)


def test_info_tells_the_shares(corpora, capsys):
    a, b, _ = (str(corpus.folder) for corpus in corpora)
    assert exit_code(corpus_module.main, "info", f"{a}=0.9", f"{b}=0.1", "--verify") == 0
    out = capsys.readouterr().out
    assert f"90.00% {a}" in out and f"10.00% {b}" in out and "checksums" in out
    for arguments, message in (
        ([f"{a}=0.9", b], "a weight for each corpus or for none"),
        ([f"{a}=-1", f"{b}=2"], "expected a weight of at least 0, found -1"),
        ([f"{a}=0", f"{b}=0"], "the weights of the corpora are all 0"),
    ):
        assert exit_code(corpus_module.main, "info", *arguments) == 2
        assert message in capsys.readouterr().err


def test_corpora_of_different_tokenizers_are_refused(corpora, tmp_path, capsys):
    other = make_corpus(tmp_path, ["a house"], small_tokenizer(900))
    assert exit_code(corpus_module.main, "info", corpora[0].folder, other.folder) == 2
    assert f"{other.folder}: made with another tokenizer than" in capsys.readouterr().err
    with pytest.raises(UserError, match="made with another tokenizer"):
        prepared(tmp_path, f"{corpora[0].folder},{other.folder}")


def prepared(folder, text):
    valid = folder / "valid.txt"
    valid.write_text("the little girl\n" * 99)
    config = load_config([f"--data.train={text}", f"--data.valid={valid}", f"--run={folder}/run"])
    return prepare(config, lambda _: None)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (("=1", ""), "expected a weight for each text or for none"),
        (("=1", "=-1"), "expected weights of at least 0, found -1"),
        (("=0", "=0.0"), "the weights are all 0"),
        (("=1", "=x"), "expected PATH or PATH=WEIGHT"),
    ],
)
def test_wrong_weights_are_refused(corpora, tmp_path, weights, message):
    entries = [f"{corpus.folder}{w}" for corpus, w in zip(corpora, weights, strict=False)]
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, ",".join(entries))


def test_texts_with_weights_become_corpora_of_their_own(tmp_path):
    paths = sample_paths()
    found = prepared(tmp_path, f"{paths[0]}=3,{paths[1]}=1")
    assert found.train.weights == (3, 1)
    assert found.train.corpora[0].tokenizer.sha256 == found.tokenizer.sha256
    again = prepared(tmp_path, f"{paths[0]}=3,{paths[1]}=1")
    assert [len(c) for c in again.train.corpora] == [len(c) for c in found.train.corpora]


def test_a_run_on_a_mixture_tells_its_shares_and_its_wait(corpora, tmp_path):
    valid = tmp_path / "valid.txt"
    valid.write_text(sample_paths()[1].read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    text = f"--data.train={corpora[0].folder}=0.75,{corpora[1].folder}=0.25"
    done = train(tmp_path / "run", "--steps", "3", text, f"--data.valid={valid}")
    assert f"75.00% {corpora[0].folder}" in done.stdout and "data wait " in done.stdout
    (timing,) = read_records(tmp_path / "run" / "timing.jsonl")
    assert 0 <= timing["data_wait"] <= 1
