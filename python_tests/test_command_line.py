"""What the command lines share."""

import argparse

import pytest
from corpora import exit_code

from metro_ext import corpus, tokenizer
from metro_ext.command_line import at_least
from metro_ext.sample_text import sample_paths


def test_at_least():
    assert at_least(1)("1") == 1 and at_least(0)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="must be at least 2, found 1"):
        at_least(2)("1")


def test_numbers_that_are_too_small(tmp_path, capsys):
    text, out = sample_paths()[1], ["--output", tmp_path / "out"]
    build = ["build", text, "--tokenizer", "x", *out]
    assert exit_code(corpus.main, *build, "--threads", -1) == 2
    assert "argument --threads: must be at least 1, found -1" in capsys.readouterr().err
    train = ["train", text, "--vocab-size", 300, *out]
    assert exit_code(tokenizer.main, *train, "--sample-bytes", 0) == 2
    assert "argument --sample-bytes: must be at least 1, found 0" in capsys.readouterr().err
    assert exit_code(tokenizer.main, *train, "--sample-bytes", "much") == 2
    assert "invalid whole_number value: 'much'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
