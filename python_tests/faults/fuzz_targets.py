"""What is fuzzed: for each name a function of a scratch folder that gives a target of fuzz.py."""

import contextlib
import json
import os
import random
import shutil
import unittest.mock
from pathlib import Path

import fuzz
import sentencepiece
import torch
from corpora import make_corpus, small_tokenizer
from fuzz_operators import operators
from fuzz_tasks import blimp, json_tasks, squad, tsv_tasks
from safetensors.torch import save

from metro_ext import checkpoint, corpus_format, mpnet
from metro_ext.atomic import sha256_file
from metro_ext.batches import BatchSource
from metro_ext.config import from_dict, load_config, to_dict, to_toml
from metro_ext.corpus import Corpus
from metro_ext.corpus_build import build_corpus, work_folder
from metro_ext.made_from import MadeFrom, text_files
from metro_ext.monitor import read_records
from metro_ext.sample_text import sample_paths
from metro_ext.text_files import read_paragraphs
from metro_ext.tokenizer import Tokenizer, train_tokenizer
from metro_ext.tokenizer_json import (
    CHARACTER_MAP,
    NORMALIZER_SPEC,
    message_fields,
    tokenizer_document,
)
from metro_ext.word_encoder import WordEncoder


def configuration(folder: Path) -> fuzz.Target:
    path = folder / "config.toml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        config = load_config((), path)
        assert from_dict(to_dict(config)) == config

    return fuzz.by_mutation(
        check, to_toml(load_config()).encode(), b'preset = "base"\n[optim]\nlr=1'
    )


def command_line(folder: Path) -> fuzz.Target:
    def check(data: bytes) -> None:
        argv = [word.decode("utf-8", "surrogateescape") for word in data.split(b" ")]
        config = load_config(argv, known_options=("--config",))
        path = folder / "config.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        assert load_config((), path) == config

    return fuzz.by_mutation(
        check,
        b"--preset base --optim.lr 1e-3 --run.seed=5 --data.train=a.txt,b --data.cased --steps 9",
        b'--data.train=["a","b"] --model.hidden=64 --model.heads 4 --objective electra',
    )


def _corpus(folder: Path) -> Path:
    documents = ["one little girl and her dog"] * 30
    return make_corpus(folder, documents, small_tokenizer(), shard_tokens=100).folder


def _use(corpus: Corpus) -> None:
    corpus.unigram_counts()
    for index in range(0, corpus.manifest.documents, 7):
        corpus.document(index)
    source = BatchSource(corpus, 32, 16, seed=1)
    source.batch(0)
    source.documents(3)


def manifest(folder: Path) -> fuzz.Target:
    made = _corpus(folder)
    path = made / "manifest.json"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        _use(Corpus.open(made))

    return fuzz.by_mutation(check, path.read_bytes())


def signed_manifest(folder: Path) -> fuzz.Target:
    """Manifests whose checksum holds: what a careless writer could have made."""
    made = _corpus(folder)
    path = made / "manifest.json"

    def check(data: bytes) -> None:
        try:
            body = json.loads(data)
            body.pop("sha256", None)
            body["sha256"] = corpus_format._checksum(body)
            path.write_text(json.dumps(body))
        except (ValueError, AttributeError, TypeError, RecursionError):
            path.write_bytes(data)
        _use(Corpus.open(made))

    return fuzz.by_mutation(check, path.read_bytes())


def shards(folder: Path) -> fuzz.Target:
    made = _corpus(folder)
    good = {name: (made / name).read_bytes() for name in ("shard-00000.bin", "documents.bin")}

    def target(chance: random.Random) -> None:
        name = chance.choice(list(good))
        data = fuzz.mutated(good[name], chance)
        if chance.random() < 0.8:  # of the right size: past the first check
            data = data[: len(good[name])].ljust(len(good[name]), b"\0")
        fuzz.record(data)
        (made / name).write_bytes(data)
        try:
            opened = Corpus.open(made)
            _use(opened)
            opened.verify()
        finally:
            (made / name).write_bytes(good[name])

    return target


def tokenizer(folder: Path) -> fuzz.Target:
    path = folder / "t.model"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        loaded = Tokenizer.load(path)
        loaded.decode(loaded.encode("one little girl [MASK]", allow_mask=True))

    return fuzz.by_mutation(check, small_tokenizer(300).model)


def tokenizer_tables(folder: Path) -> fuzz.Target:
    """What is read out of a model besides: the character map, the merges, whether words split."""
    good = _with_a_small_map(folder).model
    path = folder / "t.model"
    character_map = message_fields(message_fields(good)[NORMALIZER_SPEC])[CHARACTER_MAP]
    begin = good.index(character_map)
    end = begin + len(character_map)

    def target(chance: random.Random) -> None:
        if chance.random() < 0.5:  # of the same size, so that sentencepiece takes it
            edited = fuzz.mutated(character_map, chance)
            data = good[:begin] + edited[: end - begin].ljust(end - begin, b"\0") + good[end:]
        else:
            data = fuzz.mutated(good, chance)
        fuzz.record(data)
        path.write_bytes(data)
        loaded = Tokenizer.load(path)
        WordEncoder(loaded).encode(["One little girl", "\u2581 two  \u2460words"])
        tokenizer_document(loaded)

    return target


def _with_a_small_map(folder: Path) -> Tokenizer:
    """A tokenizer whose character map has a few keys: its own takes a second to read."""
    rules = folder / "rules.tsv"
    rules.write_text("41\t61\n41 301\t61 301\nC9\t65 301\n2460\t31\n2460 200D\t31\n200B\t\n")
    train = sentencepiece.SentencePieceTrainer.train

    def with_rules(**options) -> None:
        del options["normalization_rule_name"]
        train(**options, normalization_rule_tsv=str(rules))

    with unittest.mock.patch("sentencepiece.SentencePieceTrainer.train", with_rules):
        return train_tokenizer([sample_paths()[1]], 400)


def build_files(folder: Path) -> fuzz.Target:
    """What a killed build has left, taken up again."""
    text, output = folder / "text.txt", folder / "corpus"
    text.write_text("one little girl\n\nand her dog\n" * 9, encoding="utf-8")
    rename = os.rename
    with (
        unittest.mock.patch("os.rename", side_effect=KeyboardInterrupt),
        contextlib.suppress(KeyboardInterrupt),
    ):
        build_corpus([text], small_tokenizer(), output, workers=1, dedup=True, shard_tokens=50)
    assert os.rename is rename
    work = work_folder(output)
    good = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    names = [path for path, content in good.items() if content and path.name != "tokenizer.model"]

    def target(chance: random.Random) -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        for path, content in good.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        path = chance.choice(names)
        data = fuzz.mutated(good[path], chance)
        fuzz.record(path.name.encode() + b" " + data)
        path.write_bytes(data)
        build_corpus([text], small_tokenizer(), output, workers=1, dedup=True, shard_tokens=50)
        _use(Corpus.open(output))
        Corpus.open(output).verify()

    return target


def made_from(folder: Path) -> fuzz.Target:
    path, text = folder / "record.json", folder / "text.txt"
    text.write_text("some text\n", encoding="utf-8")
    wanted = MadeFrom({"data.vocab_size": 300, "data.cased": False}, text_files([text]))
    wanted.write(path)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        wanted.difference(path)

    return fuzz.by_mutation(check, path.read_bytes())


def checkpoint_state(folder: Path) -> fuzz.Target:
    return _checkpoint(folder, "state.json")


def checkpoint_tensors(folder: Path) -> fuzz.Target:
    return _checkpoint(folder, "tensors.safetensors")


def _checkpoint(folder: Path, name: str) -> fuzz.Target:
    """Also with checksums that hold, so that the damage reaches the parser behind them."""
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros(5, dtype=torch.uint8)}
    saved = checkpoint.save_checkpoint(folder / "c", 7, tensors, {"x": [1, 2.5, "y"]})
    good = {n: (saved / n).read_bytes() for n in ("state.json", "tensors.safetensors")}

    def target(chance: random.Random) -> None:
        data = fuzz.mutated(good[name], chance)
        fuzz.record(data)
        (saved / name).write_bytes(data)
        if chance.random() < 0.7:
            _sign(saved)
        try:
            checkpoint.load_checkpoint(folder / "c")
        finally:
            for other, content in good.items():
                (saved / other).write_bytes(content)

    return target


def _sign(saved: Path) -> None:
    try:
        document = json.loads((saved / "state.json").read_bytes())
        document["tensors_sha256"] = sha256_file(saved / "tensors.safetensors")
        (saved / "state.json").write_bytes(checkpoint._encode(document))
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass  # no longer JSON of that kind: unsigned, then


def mpnet_checkpoint(folder: Path) -> fuzz.Target:
    good = {
        "config.json": b'{"model_type": "mpnet", "hidden_size": 16, "vocab_size": 30}',
        "model.safetensors": save({"mpnet.a": torch.ones(2, 2)}),
    }

    def target(chance: random.Random) -> None:
        for name, content in good.items():
            (folder / name).write_bytes(content)
        name = chance.choice(list(good))
        data = fuzz.mutated(good[name], chance)
        fuzz.record(data)
        (folder / name).write_bytes(data)
        mpnet.read_checkpoint(folder)

    return target


def records(folder: Path) -> fuzz.Target:
    path = folder / "metrics.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        read_records(path)

    return fuzz.by_mutation(check, b'{"step": 3, "loss": 1.5}\n{"step": 6, "loss": "nan"}\n' * 3)


def texts(folder: Path) -> fuzz.Target:
    plain = {
        ".txt": "a line\n\nanother é\n".encode() * 5,
        ".jsonl": b'{"text": "a document\\nof lines"}\n{"text": ""}\n' * 4,
    }
    seeds = {
        kind + packed: data
        for kind, content in plain.items()
        for packed, data in fuzz.compressed(content).items()
    }

    def target(chance: random.Random) -> None:
        suffix = chance.choice(list(seeds))
        data = fuzz.mutated(seeds[suffix], chance)
        fuzz.record(suffix.encode() + b" " + data)
        path = folder / f"text{suffix}"
        path.write_bytes(data)
        for _ in read_paragraphs(path):
            pass

    return target


TARGETS = {
    target.__name__: target
    for target in (
        configuration, command_line, manifest, signed_manifest, shards, build_files, made_from,
        tokenizer, tokenizer_tables, checkpoint_state, checkpoint_tensors, mpnet_checkpoint,
        records, texts, tsv_tasks, json_tasks, squad, blimp, operators,
    )
}  # fmt: skip
