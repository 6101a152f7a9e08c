"""Corpora that are cut, flipped, mixed up or contradict themselves: found, with the file's name."""

import json
import os

import pytest
from corpora import exit_code, make_corpus, small_tokenizer

from metro_ext import corpus
from metro_ext.batches import BatchSource
from metro_ext.corpus import Corpus
from metro_ext.errors import UserError


@pytest.fixture
def built(tmp_path):
    documents = ["one little girl and her dog"] * 50
    return make_corpus(tmp_path, documents, small_tokenizer(), shard_tokens=100).folder


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def info_error(folder, capsys, *options):
    assert exit_code(corpus.main, "info", folder, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", ["shard-00001.bin", "documents.bin"])
def test_truncated_file(built, capsys, name):
    size = (built / name).stat().st_size
    os.truncate(built / name, size - 1)
    error = info_error(built, capsys)
    assert f"{name}: truncated: expected {size} bytes, found {size - 1}" in error
    os.truncate(built / name, size + 1)
    assert f"too long: expected {size} bytes, found {size + 1}" in info_error(built, capsys)


@pytest.mark.parametrize(
    "name", ["shard-00001.bin", "documents.bin", "counts.bin", "tokenizer.model"]
)
def test_missing_file(built, capsys, name):
    (built / name).unlink()
    assert f"{name}: the file is missing" in info_error(built, capsys)


@pytest.mark.parametrize("name", ["shard-00000.bin", "documents.bin", "counts.bin"])
@pytest.mark.parametrize("place", [0, -1])
def test_flipped_byte_is_found_by_verify(built, capsys, name, place):
    flip(built / name, place)
    assert f"{name}: damaged: expected sha256" in info_error(built, capsys, "--verify")


def test_flipped_byte_anywhere_in_manifest_or_tokenizer_is_found_at_once(built):
    for name in ("manifest.json", "tokenizer.model"):
        good = (built / name).read_bytes()
        for place in range(0, len(good), max(1, len(good) // 150)):
            flip(built / name, place)
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                Corpus.open(built)
            (built / name).write_bytes(good)
    Corpus.open(built).verify()


def rewrite_manifest(folder, **changes):
    """A manifest that is wrong but whole: its checksum is right."""
    from metro_ext import corpus_format

    body = json.loads((folder / "manifest.json").read_text())
    body.pop("sha256")
    body.update(changes)
    body["sha256"] = corpus_format._checksum(body)
    (folder / "manifest.json").write_text(json.dumps(body))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 3},
        {"tokens": -1},
        {"documents": "fifty"},
        {"documents": True},
        {"dtype": "uint32"},
        {"vocab_size": 70000},
        {"vocab_size": 0},
        {"shards": None},
        {"shards": []},
        {"shards": [{"tokens": 10**18, "sha256": ""}]},
        {"unigram_entropy_nats": float("nan")},
        {"unigram_entropy_nats": None},
        {"surprise": 1},
        {"duplicates": -1},
        {"counts_sha256": None},
        {"format": "other"},
        {"version": 99},
    ],
)
def test_manifest_that_contradicts_itself(built, capsys, changes):
    rewrite_manifest(built, **changes)
    assert "manifest.json" in info_error(built, capsys)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_manifest_that_is_none(built, capsys, content):
    (built / "manifest.json").write_bytes(content)
    assert "manifest.json: " in info_error(built, capsys)


def test_folder_that_is_no_corpus(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        assert f"{folder}: not a corpus" in info_error(folder, capsys)


def test_tokenizer_that_is_not_the_shards(built, capsys):
    with pytest.raises(UserError, match="made with another tokenizer"):
        Corpus.open(built, small_tokenizer(vocab_size=900))
    Corpus.open(built, small_tokenizer())
    (built / "tokenizer.model").write_bytes(small_tokenizer(vocab_size=900).model)
    assert "not the tokenizer that made the shards" in info_error(built, capsys)


def test_id_out_of_range_is_found_by_batches_counts_and_verify(built):
    shard = built / "shard-00001.bin"
    data = bytearray(shard.read_bytes())
    data[2 * 7 : 2 * 8] = (1000).to_bytes(2, "little")
    shard.write_bytes(data)
    damaged = Corpus.open(built)
    message = r"shard-00001\.bin: damaged: expected ids below 1000, found 1000 at token 7"
    with pytest.raises(UserError, match=message):
        damaged._count()
    source = BatchSource(damaged, 30, 30, seed=0)
    with pytest.raises(UserError, match=message):
        for index in range(source.windows_per_epoch + 1):
            source.batch(index)
    with pytest.raises(UserError, match=r"shard-00001\.bin: damaged: expected sha256"):
        damaged.verify()


def test_document_starts_that_disagree_with_the_shards(built):
    """A checksum that is right does not make the content right."""
    from metro_ext.atomic import sha256_file

    flip(built / "documents.bin", 8)
    rewrite_manifest(built, documents_sha256=sha256_file(built / "documents.bin"))
    with pytest.raises(UserError, match=r"documents\.bin: its document starts are not where"):
        Corpus.open(built).verify()
