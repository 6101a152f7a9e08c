"""Files that are whole or absent, mistakes that become sentences, numbers of command lines."""

import argparse
import errno
import os

import pytest
from corpora import exit_code

from metro_ext import corpus, tokenizer
from metro_ext.atomic import atomic_write
from metro_ext.command_line import at_least, run
from metro_ext.errors import UserError
from metro_ext.sample_text import sample_paths


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


def test_at_least():
    assert at_least(1)("1") == 1 and at_least(0)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="must be at least 2, found 1"):
        at_least(2)("1")


def test_numbers_that_are_too_small(tmp_path, capsys):
    text, out = sample_paths()[1], ["--output", tmp_path / "out"]
    build = ["build", text, "--tokenizer", "x", *out]
    assert exit_code(corpus.main, *build, "--workers", -1) == 2
    assert "argument --workers: must be at least 1, found -1" in capsys.readouterr().err
    train = ["train", text, "--vocab-size", 300, *out]
    assert exit_code(tokenizer.main, *train, "--sample-bytes", 0) == 2
    assert "argument --sample-bytes: must be at least 1, found 0" in capsys.readouterr().err
    assert exit_code(tokenizer.main, *train, "--sample-bytes", "much") == 2
    assert "invalid whole_number value: 'much'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
