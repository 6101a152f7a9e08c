"""Ids word by word are the ids of the whole text: by the model's properties, and by trial."""

import numpy as np
import pytest
from corpora import real_text, small_tokenizer, wide_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metro_ext import word_encoder
from metro_ext.sample_text import sample_paths
from metro_ext.word_encoder import WordEncoder, splits_at_spaces


def encoded(encoder, texts):
    ids, lengths = encoder.encode(texts)
    assert ids.dtype == np.uint32 and lengths.shape == (len(texts),)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths))[:-1]]


@pytest.mark.parametrize("cased", [False, True])
def test_our_models_can_be_split_at_spaces(cased):
    assert splits_at_spaces(small_tokenizer(cased=cased))
    assert splits_at_spaces(wide_tokenizer())


# What the normaliser folds, composes, deletes or turns into several words, around spaces.
ODD = [
    " ", "  ", "\t", "\u00a0", "\u3000", "\u200b", "\u2581", "\u00a8", "\u0301", "\u0308", "e",
    "a", "the", "Ǆ", "ﬁ", "½", "\ufdfa", "\u1100", "\u1161", "日本", "🙂", "\x00", "\r", "A",
    "[MASK]", "<s>", ".", "\U0010fffd", "\u2003", "\ufb2c", "゛",
]  # fmt: skip


@pytest.mark.parametrize("cased", [False, True])
@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.one_of(st.text(), st.lists(st.sampled_from(ODD)).map("".join))))
@example(texts=["a \u00a8 b", "\u2581 a\u2581", "e \u0301", " a  b ", "", " ", "\u200b \u200b x"])
def test_any_text_has_the_same_ids(cased, texts):
    tokenizer = small_tokenizer(cased=cased)
    encoder = WordEncoder(tokenizer)
    expected = [tokenizer.encode(text) for text in texts]
    assert encoded(encoder, texts) == expected
    assert encoded(encoder, texts) == expected  # now remembered


@pytest.mark.parametrize(
    ("limit", "value"), [("REMEMBERED_WORDS", 5), ("REMEMBERED_IDS", 50), ("LONGEST_REMEMBERED", 3)]
)
def test_forgetting_changes_nothing(monkeypatch, limit, value):
    monkeypatch.setattr(word_encoder, limit, value)
    tokenizer = small_tokenizer()
    encoder = WordEncoder(tokenizer)
    lines = sample_paths()[1].read_text(encoding="utf-8").splitlines()
    for begin in range(0, len(lines), 40):
        batch = lines[begin : begin + 40]
        assert encoded(encoder, batch) == tokenizer.encode_batch(batch)


def test_real_text_has_the_same_ids():
    tokenizer = small_tokenizer()
    lines = real_text("books-valid.txt.xz").split("\n")
    assert encoded(WordEncoder(tokenizer), lines) == tokenizer.encode_batch(lines)


@pytest.mark.parametrize(
    ("spec", "number", "value"), [(2, 3, 1), (2, 24, 1), (3, 3, 0), (3, 4, 0), (3, 5, 0)]
)
def test_models_with_other_settings_are_used_on_whole_lines(monkeypatch, spec, number, value):
    """Each field that the splitting relies on, given another value: the last one counts."""
    tokenizer = small_tokenizer()
    fields = word_encoder.message_fields
    key = number << 3
    entry = bytes([key, value] if key < 128 else [key & 127 | 128, key >> 7, value])

    def merged(message):
        found = fields(message)
        if message == tokenizer.model:
            found[spec] += entry
        return found

    monkeypatch.setattr(word_encoder, "message_fields", merged)
    assert not splits_at_spaces(tokenizer)
    encoder = WordEncoder(tokenizer)
    texts = ["the little  girl", " and her dog "]
    assert encoded(encoder, texts) == tokenizer.encode_batch(texts)
