import random
import subprocess

import pytest
from corpora import exit_code, real_text, small_tokenizer, start
from hypothesis import given, settings
from hypothesis import strategies as st

from metro_ext import tokenizer as tokenizer_module
from metro_ext.errors import UserError
from metro_ext.sample_text import sample_paths
from metro_ext.tokenizer import Tokenizer, sample_texts, train_tokenizer

TRAIN, VALID = sample_paths()


def test_special_ids_are_those_of_mpnet():
    tokenizer = small_tokenizer()
    assert tokenizer.vocab_size == 1000
    assert tokenizer.pieces(range(4)) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.pieces([tokenizer.mask_id]) == ["[MASK]"]
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert set(tokenizer.special_ids) == {0, 1, 2, 3, tokenizer.mask_id}


def test_cased_round_trip_and_uncased_folding():
    text = "Dorothy lived in the midst of the great Kansas prairies, with Uncle Henry."
    cased, uncased = small_tokenizer(cased=True), small_tokenizer(cased=False)
    assert cased.cased and not uncased.cased
    assert cased.decode(cased.encode(text)) == text
    assert uncased.decode(uncased.encode(text)) == text.lower()
    assert uncased.encode(text) == uncased.encode(text.upper())


@pytest.mark.parametrize("text", ["日本語", "naïve Ωmega", "🙂 smile", "\u0e01\u0e33", "<s> </s>"])
def test_bytes_stand_for_characters_outside_the_vocabulary(text):
    tokenizer = small_tokenizer(cased=True)
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id not in ids
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(), st.lists(st.sampled_from(["<s>", "[MASK]", " ", "a", "\x00"])).map("".join)
    )
)
def test_no_text_encodes_to_a_special_id(text):
    tokenizer = small_tokenizer()
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the [MASK] sat.", ["▁the", "[MASK]", "▁sat", "."]),
        ("the [MASK].", ["▁the", "[MASK]", "."]),
        ("[MASK] the", ["[MASK]", "▁the"]),
        ("[MASK][MASK]  [MASK]", ["[MASK]"] * 3),
        ("the\U0010fffd[MASK]", ["▁the", "[MASK]"]),  # the stand-in character is no mask
        ("the", ["▁the"]),
        ("", []),
    ],
)
def test_mask_is_encoded_when_asked_for(text, expected):
    tokenizer = small_tokenizer()
    pieces = tokenizer.pieces(tokenizer.encode(text, allow_mask=True))
    assert "".join(pieces) == "".join(expected)
    assert [p for p in pieces if p == "[MASK]"] == [p for p in expected if p == "[MASK]"]


def test_a_masked_word_leaves_its_neighbours_ids_alone():
    tokenizer = small_tokenizer()
    words = ["so", "the", "little", "girl", "went", "back", "to", "her", "aunt"]
    for masked in range(len(words)):
        spans = [tokenizer.encode(word) for word in words]
        spans[masked] = [tokenizer.mask_id]
        text = " ".join([*words[:masked], "[MASK]", *words[masked + 1 :]])
        assert tokenizer.encode(text, allow_mask=True) == [i for span in spans for i in span]


def test_a_line_break_is_a_space():
    """What lets the corpus be encoded line by line."""
    tokenizer = small_tokenizer(cased=True)
    lines = VALID.read_text(encoding="utf-8").split("\n")[:200]
    one_by_one = [i for line in lines for i in tokenizer.encode(line)]
    assert tokenizer.encode("\n".join(lines)) == one_by_one
    assert tokenizer.encode(" ".join(lines)) == one_by_one


@pytest.mark.parametrize("threads", [1, 3])
def test_encode_batch_equals_encode(threads):
    tokenizer = small_tokenizer()
    texts = ["", "one", "two words", "日本"] * 50
    assert tokenizer.encode_batch(texts, threads) == [tokenizer.encode(text) for text in texts]


def test_training_and_saving_repeat_bit_for_bit(tmp_path):
    first = train_tokenizer([VALID], 600)
    assert first.model == train_tokenizer([VALID], 600).model
    first.save(tmp_path / "a.model")
    again = Tokenizer.load(tmp_path / "a.model")
    assert (again.model, again.sha256, again.cased) == (first.model, first.sha256, first.cased)
    assert [p.name for p in tmp_path.iterdir()] == ["a.model"]


def test_a_sampled_training_sees_only_the_sample(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"word{i} " * 20 for i in range(2000)))
    whole = train_tokenizer([text], 500)
    part = train_tokenizer([text], 500, sample_bytes=20000, seed=1)
    assert part.model == train_tokenizer([text], 500, sample_bytes=20000, seed=1).model
    assert part.model != whole.model


def test_sample_is_bounded_ordered_and_uniform():
    texts = [f"{i:04d}" for i in range(1000)]
    assert sample_texts(texts, 4000, seed=0) == texts
    picked = [0] * 10
    for seed in range(200):
        sample = sample_texts(texts, 402, seed)
        assert len(sample) == 100 and sample == sorted(sample)
        for text in sample:
            picked[int(text) // 100] += 1
    # 20000 draws over 10 bins, 2000 each: chi-square with 9 degrees of freedom, 0.999 quantile.
    assert sum((n - 2000) ** 2 / 2000 for n in picked) < 27.9


def test_sample_does_not_favour_short_texts():
    generator = random.Random(0)
    texts = ["x" * generator.choice([1, 500]) for _ in range(2000)]
    shares = []
    for seed in range(50):
        sample = sample_texts(texts, 2000, seed)
        shares.append(sum(len(text) == 1 for text in sample) / len(sample))
    expected = sum(len(text) == 1 for text in texts) / len(texts)
    assert abs(sum(shares) / len(shares) - expected) < 0.1


def test_a_vocabulary_that_the_text_cannot_fill_names_the_limits():
    with pytest.raises(UserError, match=r"too large .* largest possible is (\d+)") as error:
        train_tokenizer([VALID], 128_000)
    largest = int(str(error.value).split("possible is ")[1].split(";")[0])
    assert train_tokenizer([VALID], largest).vocab_size == largest
    with pytest.raises(UserError, match=r"too small: this text needs at least (\d+)") as error:
        train_tokenizer([VALID], 100)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert train_tokenizer([VALID], least).vocab_size == least
    for size in (0, -1):
        with pytest.raises(UserError, match="at least 1"):
            train_tokenizer([VALID], size)
    with pytest.raises(UserError, match=r"coverage in 0\.98"):
        train_tokenizer([VALID], 500, character_coverage=0.5)


def test_models_that_are_not_ours_are_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path / "foreign"
    sentencepiece.SentencePieceTrainer.train(
        input=str(VALID), model_prefix=str(prefix), vocab_size=500, minloglevel=2
    )
    with pytest.raises(UserError, match=r"foreign\.model: the tokenizer's first ids must be"):
        Tokenizer.load(f"{prefix}.model")
    for garbage in (b"", b"garbage" * 20, small_tokenizer().model[:1000]):
        with pytest.raises(UserError, match=r"not a sentencepiece model|control symbol"):
            Tokenizer(garbage)


def test_damaged_models_never_crash():
    model = small_tokenizer().model
    generator = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(model)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        try:
            tokenizer = Tokenizer(bytes(damaged))
            tokenizer.encode("Hello wörld [MASK]", allow_mask=True)
        except UserError:
            refused += 1
    assert refused > 0


def test_ids_outside_the_vocabulary_are_refused():
    tokenizer = small_tokenizer()
    for ids in ([1000], [-1]):
        with pytest.raises(UserError, match=rf"ids from 0 to 999, found {ids[0]}"):
            tokenizer.decode(ids)
        with pytest.raises(UserError, match="ids from 0 to 999"):
            tokenizer.pieces(ids)
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("half \ud800 a pair")
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode_batch(["fine", "half \ud800 a pair"])


def test_command_line_round_trip(tmp_path, capsys):
    model = tmp_path / "t.model"
    main = tokenizer_module.main
    assert exit_code(main, "train", VALID, "--vocab-size", 600, "--output", model, "--cased") == 0
    assert "600 pieces, cased" in capsys.readouterr().out
    assert exit_code(main, "encode", "--tokenizer", model, "Peter and Bobbie", "went") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert exit_code(main, "decode", "--tokenizer", model, *first.split()) == 0
    assert capsys.readouterr().out == "Peter and Bobbie\n"
    assert exit_code(main, "encode", "--tokenizer", model, "--pieces", "went") == 0
    assert capsys.readouterr().out.split() == Tokenizer.load(model).pieces(map(int, second.split()))
    assert exit_code(main, "encode", "--tokenizer", model, "--allow-mask", "[MASK]") == 0
    assert int(capsys.readouterr().out) == Tokenizer.load(model).mask_id


def test_command_line_reads_standard_input(tmp_path):
    model = tmp_path / "t.model"
    small_tokenizer().save(model)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    encode = start("-m", "metro_ext.tokenizer", "encode", "--tokenizer", model, **pipes)
    ids, _ = encode.communicate("the little girl\nand the dog\n", timeout=60)
    decode = start("-m", "metro_ext.tokenizer", "decode", "--tokenizer", model, **pipes)
    text, _ = decode.communicate(ids, timeout=60)
    assert text == "the little girl\nand the dog\n"
    assert (encode.returncode, decode.returncode) == (0, 0)


@pytest.mark.parametrize("cased", [False, True])
def test_real_text_round_trips(tmp_path, cased):
    lines = real_text("books-valid.txt.xz").split("\n")
    tokenizer = small_tokenizer(cased=cased)
    for ids in tokenizer.encode_batch(lines):
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
