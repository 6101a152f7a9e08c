"""Exports are judged by transformers itself: hidden states, token ids, pipelines."""

import functools
import json
import shutil

import pytest
import torch
from corpora import exit_code, real_text, small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_runs import TINY, train

from metro_ext import export, import_mpnet, mpnet
from metro_ext.checkpoint import load_checkpoint
from metro_ext.pretrained import load
from metro_ext.tokenizer_json import tokenizer_document, write_tokenizer_files

transformers = pytest.importorskip("transformers", reason="the judge of exports: extra 'export'")

TEXTS = ["He opened the door.", "Rain.", "It was the best of times, it was the worst of times, and"]
BUCKETS = ["--model.relative_buckets=16", "--model.relative_max_distance=20"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, finished):
    out = tmp_path_factory.mktemp("export") / "whole"
    export.main([str(finished), str(out), "--training-state"])
    return out


def check_hidden_states(model, tokenizer, pretrained):
    ours = pretrained.hidden_states(TEXTS)
    for text, expected in zip(TEXTS, ours, strict=True):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
        torch.testing.assert_close(model(**ids).last_hidden_state[0], expected, atol=1e-5, rtol=0)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=32)
    assert not batch["attention_mask"].all()
    states = model(**batch).last_hidden_state
    for row, expected in zip(states, ours, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_auto_classes_give_our_hidden_states(exported, finished):
    model, info = transformers.AutoModel.from_pretrained(exported, output_loading_info=True)
    assert type(model).__name__ == "MPNetModel"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.model_max_length == 32 and tokenizer.mask_token == "[MASK]"
    check_hidden_states(model.eval(), tokenizer, load(finished))


def test_feature_extraction_pipeline(exported, finished):
    pipe = transformers.pipeline("feature-extraction", model=str(exported))
    expected = load(finished).hidden_states(TEXTS[0])[0]
    torch.testing.assert_close(torch.tensor(pipe(TEXTS[0])[0]), expected, atol=1e-5, rtol=0)


def test_auxiliary_network_fills_masks(finished, tmp_path):
    from metro_ext.inspect import inspect

    export.main([str(finished), str(tmp_path / "aux"), "--network", "auxiliary"])
    pipe = transformers.pipeline("fill-mask", model=str(tmp_path / "aux"), top_k=400)
    guesses = {guess["token"]: guess["score"] for guess in pipe("he opened the[MASK] .")}
    ours = inspect(load(finished), "he opened the[MASK] .", count=3).guesses
    (best,) = ours.values()
    tokenizer = load(finished).tokenizer
    special = sum(guesses[i] for i in tokenizer.special_ids)
    for piece, probability in best:  # ours leaves the special symbols out
        token = tokenizer._processor.piece_to_id(piece)
        assert guesses[token] / (1 - special) == pytest.approx(probability, rel=1e-3)


@torch.no_grad()
def test_other_buckets_need_our_classes(tmp_path, text):
    train(tmp_path / "run", "--steps", "2", *BUCKETS, *text)
    with pytest.raises(ValueError, match="32 relative buckets up to a distance of 128"):
        export.main([str(tmp_path / "run"), str(tmp_path / "stock")])
    assert not (tmp_path / "stock").exists()
    export.main([str(tmp_path / "run"), str(tmp_path / "ours"), "--classes", "metro"])
    import metro_ext.hf  # noqa: F401

    model = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert type(model).__name__ == "MetroMPNetModel"
    pretrained = load(tmp_path / "run")
    with torch.no_grad():  # far from zero, so that a wrong bucket shows
        model.encoder.relative_attention_bias.weight.normal_()
        pretrained.main.relative_bias.copy_(model.encoder.relative_attention_bias.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    check_hidden_states(model, tokenizer, pretrained)


def newest(folder):
    return load_checkpoint(folder / "checkpoints")


def test_round_trip_then_a_step_is_never_having_left(exported, finished, tmp_path, text):
    import_mpnet.main([str(exported), str(tmp_path / "back")])
    shutil.copytree(finished, tmp_path / "stayed")
    for name in ("back", "stayed"):
        train(tmp_path / name, "--steps", "21", *text)
    back, stayed = newest(tmp_path / "back"), newest(tmp_path / "stayed")
    assert back.step == stayed.step == 21
    assert back.tensors.keys() == stayed.tensors.keys()
    for name, tensor in stayed.tensors.items():
        assert torch.equal(back.tensors[name], tensor), name


def test_import_of_the_encoder_alone(exported, finished, tmp_path, text):
    bare = tmp_path / "bare"
    shutil.copytree(exported, bare, ignore=shutil.ignore_patterns("training-state"))
    import_mpnet.main([str(bare), str(tmp_path / "run"), *TINY, *text, "--run.seed=7"])
    ours, theirs = load(finished).main.state_dict(), load(tmp_path / "run").main.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    train(tmp_path / "run", "--steps", "2", "--run.seed=7", *text,
          "--data.tokenizer=" + str(bare / "tokenizer.model"), code=2)  # fmt: skip
    done = train(tmp_path / "run", "--steps", "2", "--model.vocab_size=400", "--run.seed=7", *text)
    assert "2/2" in done.stdout


@pytest.mark.parametrize("change, words", [
    (lambda c, f: c.update(vocab_size=500), "500 entries, the tokenizer 400"),
    (lambda c, f: c.update(hidden_size=64), "must have shape [400, 64], found [400, 32]"),
    (lambda c, f: c.update(model_type="bert"), "expected model_type mpnet, found 'bert'"),
    (lambda c, f: (f / "tokenizer.model").unlink(), "name one with --tokenizer"),
    (lambda c, f: (f / "model.safetensors").write_bytes(b"x" * 20), "is damaged"),
])  # fmt: skip
def test_what_import_refuses(exported, tmp_path, capsys, change, words):
    bad = tmp_path / "bad"
    shutil.copytree(exported, bad, ignore=shutil.ignore_patterns("training-state"))
    config = json.loads((bad / "config.json").read_text())
    change(config, bad)
    (bad / "config.json").write_text(json.dumps(config))
    assert exit_code(import_mpnet.main, bad, tmp_path / "run") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_export_overwrites_nothing(exported, finished, capsys):
    assert exit_code(export.main, finished, exported) == 2
    assert "holds a model already" in capsys.readouterr().err


# Tokenizer.


@functools.cache
def fast(tokenizer):
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_document(tokenizer)))


def assert_same_ids(tokenizer, judge, texts):
    ours = tokenizer.encode_batch(texts, threads=2)
    theirs = [e.ids for e in judge.encode_batch(texts, add_special_tokens=False)]
    for text, expected, found in zip(texts, ours, theirs, strict=True):
        assert found == expected, ascii(text)


ODD = [
    "", " ", "  two  spaces ", "\ttab\r\nline\r", "▁▁ lower one eighth ▁", "naïve café NAÏVE CAFÉ",
    "e\u0301 e\u0301\u0302 A\u030a", "\u200bzero\u200dwidth\ufeff", "\x01\x02control\x7f",
    "ﬁne ½ ①",
    "Ｆｕｌｌ ｗｉｄｔｈ～", "Straße ΣΊΣΥΦΟΣ İi", "日本語 中文 한국어 \u1112\u1161\u11ab",
    "👩‍👩‍👧‍👦 🇬🇧 👍🏽",
    "مرحبا שלום हिन्दी ไทย", "\U0010fffd \U0001d538 \ue000", "aaaaaaaaaaa ------- ....... hahaha",
    "\x01\u0301", "<0x41> 0x41", "x" * 300, "\u00a0nbsp\u3000ideographic\u2028line",
]  # fmt: skip


@pytest.mark.parametrize("cased", [False, True])
def test_ids_of_odd_text(cased):
    tokenizer = small_tokenizer(cased=cased)
    judge = fast(tokenizer)
    assert_same_ids(tokenizer, judge, ODD)
    assert_same_ids(tokenizer, judge, [f"a {text} b" for text in ODD])


@pytest.mark.parametrize("cased", [False, True])
def test_ids_of_every_character(cased):
    tokenizer = small_tokenizer(cased=cased)
    characters = [chr(c) for c in range(1, 0x30000) if not 0xD800 <= c < 0xE000]
    assert_same_ids(tokenizer, fast(tokenizer), [f"a {c}b" for c in characters])


# What composes, and what stands in the way of it: marks in and out of their canonical order, marks
# after compatibility characters, Hangul in every spelling, halfwidth kana with their sound marks,
# characters that the map deletes.
MARKS = [chr(c) for c in range(0x300, 0x34F)] + list("\u3099\u309a\uff9e\uff9f\u0591\u0651\u093c")
HANGUL = list("가각ㄱㅏㅎﾡￂ\u1100\u1161\u11ab\u11a8\u1175")
BASES = list("aAeEoOuqx1 \tﬁ①½ｶﾊカΩÅé～\u1e9bन\x01\x02\u200b<>=▁ß")
COMPOSED = st.text(st.sampled_from([*MARKS, *HANGUL, *BASES * 4]), max_size=16)
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=16)


@pytest.mark.parametrize("cased", [False, True])
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(COMPOSED | ANY, min_size=5, max_size=20))
def test_ids_of_random_strings(cased, texts):
    tokenizer = small_tokenizer(cased=cased)
    assert_same_ids(tokenizer, fast(tokenizer), texts)


def test_ids_of_each_mark_after_each_base():
    tokenizer = small_tokenizer()
    texts = [base + mark + "z" for base in BASES + HANGUL for mark in MARKS]
    texts += [base + mark + other for base in "aEﬁÅ" for mark in MARKS for other in MARKS]
    assert_same_ids(tokenizer, fast(tokenizer), texts)


def test_ids_of_books():
    texts = [line for line in real_text("books-valid.txt.xz").splitlines() if line]
    assert len(texts) > 1000
    tokenizer = small_tokenizer()
    assert_same_ids(tokenizer, fast(tokenizer), texts)


def test_pairs_offsets_and_decoding(tmp_path):
    tokenizer = small_tokenizer()
    write_tokenizer_files(tokenizer, tmp_path, 128)
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pair = judge("One door", "Two doors", return_offsets_mapping=True)
    one, two = tokenizer.encode("One door"), tokenizer.encode("Two doors")
    assert pair["input_ids"] == [0, *one, 2, 2, *two, 2]
    assert pair["offset_mapping"][-2][1] == len("Two doors")
    text = "he said: naïve 日本"
    assert judge.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    literal = judge("<s> [MASK]", split_special_tokens=True, add_special_tokens=False)
    assert literal["input_ids"] == tokenizer.encode("<s> [MASK]")


def test_stock_settings():
    from metro_ext.config_schema import ModelConfig

    assert mpnet.is_stock(ModelConfig()) and not mpnet.is_stock(ModelConfig(relative_buckets=64))
