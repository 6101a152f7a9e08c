"""Small tokenizers and corpora for the tests."""

import functools
import lzma
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from metro_ext import command_line
from metro_ext.corpus import Corpus
from metro_ext.corpus_build import build_corpus
from metro_ext.sample_text import sample_paths
from metro_ext.tokenizer import Tokenizer, train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]


@functools.cache
def small_tokenizer(vocab_size: int = 1000, cased: bool = False) -> Tokenizer:
    return train_tokenizer([sample_paths()[1]], vocab_size, cased)


@functools.cache
def wide_tokenizer() -> Tokenizer:
    """One with more than 65536 ids: a piece for each of 75000 ideographs and syllables."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "wide.txt"
        characters = [chr(c) for c in (*range(0x4E00, 0x9FFF), *range(0x20000, 0x2A6D0))]
        characters += [chr(c) for c in range(0xAC00, 0xD7A0)]
        lines = [" ".join(characters[i : i + 100]) for i in range(0, len(characters), 100)]
        text.write_text("\n".join(lines), encoding="utf-8")
        return train_tokenizer([text], vocab_size=75200, character_coverage=1.0)


def make_corpus(folder: Path, documents: Sequence[str], tokenizer: Tokenizer, **options) -> Corpus:
    """Build a corpus under `folder`, one text file of documents in, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    build_corpus([text], tokenizer, folder / "corpus", workers=1, **options)
    return Corpus.open(folder / "corpus")


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same names with the same bytes."""
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one, other)]
    return contents[0] == contents[1]


def real_text(name: str) -> str:
    """A file of METRO_DATA (default ../shared/data), or skip the test."""
    folder = Path(os.environ.get("METRO_DATA", REPOSITORY / "../shared/data"))
    path = folder / name
    if not path.is_file():
        pytest.skip(f"{name} is not in METRO_DATA ({folder})")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def exit_code(main: Callable[[Sequence[str]], None], *argv: object) -> int:
    """The exit code of a command line, run in this process."""
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda: main([str(argument) for argument in argv]))
    return ended.value.code


def start(*argv: object, **options) -> subprocess.Popen:
    """A Python process: `-m` and a module, or `-c` and a program, and arguments."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *map(str, argv)]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **options)
