"""What a user can do wrong with texts and corpora: one sentence, exit code 2, nothing left."""

import errno
import gzip
import json
import lzma
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from corpora import exit_code, make_corpus, same_files, small_tokenizer, start

from metro_ext import corpus, corpus_build, corpus_parts, corpus_plan, tokenizer
from metro_ext.atomic import atomic_write
from metro_ext.batches import BatchSource
from metro_ext.command_line import run
from metro_ext.corpus import Corpus
from metro_ext.errors import UserError
from metro_ext.sample_text import sample_paths


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "t.model"
    small_tokenizer().save(path)
    return path


def bad_text(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


LINE = b'{"text": "fine"}\n'
BAD_TEXTS = {
    "empty.txt": (b"", "the file is empty"),
    "empty.txt.xz": (lzma.compress(b""), "the file is empty"),
    "blank.txt": (b"\n \n\n", "the input holds no text"),
    "utf8.txt": (b"fine\nna\xefve\n", "line 2 is not valid UTF-8 (byte 0xef at offset 7)"),
    "utf8.txt.gz": (gzip.compress(b"\xff"), "line 1 is not valid UTF-8 (byte 0xff at offset 0)"),
    "utf8.jsonl": (LINE + b'{"text": "\xff"}\n', "line 2 is not valid UTF-8"),
    "broken.jsonl": (LINE + b'{"text": "cut', "line 2 is not valid JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not valid JSON"),
    "list.jsonl": (LINE * 2 + b"[1]\n", "line 3: expected a JSON object, found list"),
    "field.jsonl": (LINE + b'{"body": "b"}\n', "line 2 has no field 'text' (its fields: body)"),
    "type.jsonl": (b'{"text": 3}\n', "line 1: expected text in field 'text', found int"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "line 1: field 'text' holds half of a surrogate"),
    "cut.txt.xz": (lzma.compress(b"word " * 999)[:-20], "damaged or cut short"),
    "cut.txt.gz": (gzip.compress(b"word " * 999)[:-9], "damaged or cut short"),
    "garbage.txt.xz": (b"not xz at all", "damaged or cut short"),
    "garbage.txt.gz": (b"not gz at all", "damaged or cut short"),
    "crc.txt.gz": (gzip.compress(b"word " * 99)[:-8] + bytes(8), "damaged or cut short"),
    "garbage.txt.zst": (b"not zstd at all", "damaged or cut short"),
    "garbage.parquet": (b"not parquet at all", "the Parquet file is damaged or none"),
    "notes.pdf": (b"x", "expected a name that ends in one of .txt"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_text(tmp_path, model, capsys, name):
    content, message = BAD_TEXTS[name]
    file = bad_text(tmp_path, name, content)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    assert exit_code(corpus.main, "build", file, "--tokenizer", model, "--output", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert name in error or name == "blank.txt"
    assert exit_code(tokenizer.main, "train", file, "--vocab-size", 300, "--output", out) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_bad_file_after_good_ones_leaves_nothing(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr(corpus_plan, "UNIT_BYTES", 1000)  # some units are on disk by then
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes(sample_paths()[1].read_bytes())
    bad_text(texts, "b.txt", b"\xff")
    before = sorted(tmp_path.iterdir())
    arguments = ["--tokenizer", model, "--output", tmp_path / "out", "--shard-tokens", 500]
    assert exit_code(corpus.main, "build", texts, *arguments) == 2
    assert "b.txt: line 1 is not valid UTF-8" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_no_input_files(tmp_path, model, capsys):
    (tmp_path / "none").mkdir()
    arguments = ["--tokenizer", model, "--output", tmp_path / "out"]
    assert exit_code(corpus.main, "build", tmp_path / "none", *arguments) == 2
    assert "none: the folder holds no .txt" in capsys.readouterr().err
    assert exit_code(corpus.main, "build", tmp_path / "absent.txt", *arguments) == 2
    assert "absent.txt: there is no such file or folder" in capsys.readouterr().err
    assert exit_code(corpus.main, "build", *arguments) == 2
    assert "INPUT" in capsys.readouterr().err
    with pytest.raises(UserError, match="name at least one"):
        corpus_build.build_corpus([], small_tokenizer(), tmp_path / "out")


def test_output_that_exists_is_kept(tmp_path, model, capsys):
    text = sample_paths()[1]
    kept = make_corpus(tmp_path / "kept", ["some words"], small_tokenizer()).folder
    arguments = ["--tokenizer", model, "--output", kept]
    assert exit_code(corpus.main, "build", text, *arguments) == 2
    assert f"{kept}: it exists already" in capsys.readouterr().err
    Corpus.open(kept).verify()
    before = model.read_bytes()
    assert exit_code(tokenizer.main, "train", text, "--vocab-size", 300, "--output", model) == 2
    assert f"{model}: it exists already" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_wrong_options(tmp_path, model, capsys):
    text = sample_paths()[1]
    arguments = ["build", text, "--tokenizer", model, "--output", tmp_path / "out"]
    assert exit_code(corpus.main, *arguments, "--shards", 3) == 2
    assert "unrecognized arguments: --shards" in capsys.readouterr().err
    assert exit_code(corpus.main, *arguments, "--shard-tokens", 0) == 2
    assert "at least 1 token a shard" in capsys.readouterr().err
    assert exit_code(tokenizer.main, "train", text, "--output", "x") == 2
    assert "--vocab-size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_vocabulary_too_large_for_the_text(tmp_path, capsys):
    arguments = ["train", sample_paths()[1], "--vocab-size", 131072]
    assert exit_code(tokenizer.main, *arguments, "--output", tmp_path / "t") == 2
    assert "the largest possible is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tokenizer_command_line_input(tmp_path, model, capsys):
    use = ["--tokenizer", model]
    assert exit_code(tokenizer.main, "decode", *use, "1", "x") == 2
    assert "expected ids, whole numbers" in capsys.readouterr().err
    assert exit_code(tokenizer.main, "decode", *use, "1000") == 2
    assert "expected ids from 0 to 999, found 1000" in capsys.readouterr().err
    assert exit_code(tokenizer.main, "encode", "--tokenizer", tmp_path / "no", "x") == 2
    assert "there is no such file" in capsys.readouterr().err
    bad = bad_text(tmp_path, "bad.model", b"garbage")
    assert exit_code(tokenizer.main, "encode", "--tokenizer", bad, "x") == 2
    assert "bad.model: not a sentencepiece model" in capsys.readouterr().err
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "surrogateescape"}
    process = start("-m", "metro_ext.tokenizer", "encode", *use, **pipes)
    _, error = process.communicate("fine\n\udcff\n", timeout=60)
    assert process.returncode == 2
    assert error == "error: standard input: line 2 is not valid UTF-8\n"


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


def test_full_disk_during_a_build(tmp_path, model, capsys, monkeypatch):
    """The build goes on when there is room again."""
    written = []

    def append(self, ids):
        written.append(ids.size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ["build", sample_paths()[1], "--tokenizer", model, "--workers", 1]
    with monkeypatch.context() as patch:
        patch.setattr(corpus_parts._PartWriter, "_append", append)
        assert exit_code(corpus.main, *arguments, "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: the disk is full")
    assert written and not (tmp_path / "out").exists()
    assert exit_code(corpus.main, *arguments, "--output", tmp_path / "out") == 0
    assert exit_code(corpus.main, *arguments, "--output", tmp_path / "fresh") == 0
    assert not list(tmp_path.glob(".*"))
    assert same_files(tmp_path / "out", tmp_path / "fresh")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_really_full_disk(small_disk, model, capsys):
    arguments = ["--tokenizer", model, "--output", small_disk / "out", "--shard-tokens", 10_000]
    assert exit_code(corpus.main, "build", sample_paths()[0], *arguments) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not (small_disk / "out").exists()
    shutil.rmtree(corpus_build.work_folder(small_disk / "out"))

    target = small_disk / "file"
    with atomic_write(target) as file:
        file.write(b"old")
    with pytest.raises(OSError) as error, atomic_write(target) as file:
        file.write(bytes(1 << 20))
    assert error.value.errno == errno.ENOSPC
    assert target.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [target]


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    with atomic_write(path, "w") as file:
        file.write("old é")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "old é"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old é"

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_text(encoding="utf-8") == "old é"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with pytest.raises(ValueError, match="mode"), atomic_write(path, "a"):
        pass


def test_atomic_write_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as error, atomic_write(tmp_path / "no" / "file"):
        pass
    assert error.value.filename == str(tmp_path / "no" / "file")


def test_atomic_write_gives_the_umask_s_permissions(tmp_path):
    with atomic_write(tmp_path / "ours") as file:
        file.write(b"")
    (tmp_path / "usual").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("expected this, found that"), 2, "error: expected this, found that\n"),
        (OSError(errno.ENOSPC, "x"), 2, "error: the disk is full: "),
        (OSError(errno.EACCES, "x", "a.txt"), 2, "error: a.txt: permission denied: "),
        (OSError(errno.ENOENT, "x", "a.txt"), 2, "error: a.txt: there is no such file"),
        (OSError(errno.EIO, "I/O error", "a.txt"), 2, "error: a.txt: I/O error\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_run_turns_mistakes_into_sentences(capsys, error, code, message):
    def main():
        raise error

    assert exit_code(lambda _: main()) == code
    assert capsys.readouterr().err.startswith(message)


def test_run_leaves_defects_their_traceback():
    def main():
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        run(main)


def test_a_reader_that_goes_away_is_no_traceback(model):
    text = Path(model.parent / "many.txt")
    text.write_text("the little girl\n" * 50_000)
    pipes = {"stdin": text.open(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start("-m", "metro_ext.tokenizer", "encode", "--tokenizer", model, **pipes)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1
