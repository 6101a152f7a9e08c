"""What a user can do wrong with texts and corpora: one sentence, exit code 2, nothing left."""

import errno
import gzip
import lzma
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from corpora import exit_code, make_corpus, same_files, small_tokenizer, start

from metro_ext import corpus, corpus_build, corpus_parts, corpus_plan, tokenizer
from metro_ext.atomic import atomic_write
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
    assert "the disk is full: free some space" in capsys.readouterr().err
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


def test_a_reader_that_goes_away_is_no_traceback(model):
    text = Path(model.parent / "many.txt")
    text.write_text("the little girl\n" * 50_000)
    pipes = {"stdin": text.open(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start("-m", "metro_ext.tokenizer", "encode", "--tokenizer", model, **pipes)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1
