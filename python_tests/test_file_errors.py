"""What is wrong with Parquet and zstd files, and where in a file: one sentence, exit code 2."""

import os
import re
import sys

import pytest
from corpora import exit_code, small_tokenizer

from metro_ext import corpus, corpus_build, corpus_plan
from metro_ext.errors import UserError

LINE = b'{"text": "fine"}\n'


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "t.model"
    small_tokenizer().save(path)
    return path


def bad_text(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


def parquet(folder, name, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), folder / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1], "body": ["x"]}, "there is no column 'text' (its columns: id, body): name the"),
        ({"text": [1, 2]}, "expected text in column 'text', found int64"),
        ({"text": [b"x"]}, "expected text in column 'text', found binary"),
        ({"text": ["x", None]}, "row 2: expected text in column 'text', found null"),
    ],
)
def test_bad_parquet(tmp_path, model, capsys, columns, message):
    """Also where a good file comes first: files of one folder may differ in their schema."""
    parquet(tmp_path, "a.parquet", text=["fine"])
    parquet(tmp_path, "b.parquet", **columns)
    arguments = ["--tokenizer", model, "--output", tmp_path / "out"]
    assert exit_code(corpus.main, "build", tmp_path, *arguments) == 2
    assert f"b.parquet: {message}" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()


def test_cut_parquet_and_parquet_without_rows(tmp_path, model, capsys):
    parquet(tmp_path, "a.parquet", text=["fine"] * 999)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-9])
    arguments = ["build", tmp_path, "--tokenizer", model, "--output", tmp_path / "out"]
    assert exit_code(corpus.main, *arguments) == 2
    assert "a.parquet: the Parquet file is damaged or none" in capsys.readouterr().err
    (tmp_path / "a.parquet").write_bytes(
        whole[:4] + bytes(len(whole) // 2) + whole[len(whole) // 2 + 4 :]
    )
    assert exit_code(corpus.main, *arguments) == 2
    assert "a.parquet: the Parquet file is damaged or none" in capsys.readouterr().err
    pyarrow = pytest.importorskip("pyarrow")
    parquet(tmp_path, "a.parquet", text=pyarrow.array([], pyarrow.string()))
    assert exit_code(corpus.main, *arguments) == 2
    assert "a.parquet: the file is empty" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [3, 20, -1])
def test_cut_zstd(tmp_path, model, capsys, cut):
    packed = (
        pytest.importorskip("zstandard").ZstdCompressor().compress(os.urandom(99).hex().encode())
    )
    file = bad_text(tmp_path, "cut.txt.zst", packed[:cut])
    arguments = ["build", file, "--tokenizer", model, "--output", tmp_path / "out"]
    assert exit_code(corpus.main, *arguments) == 2
    assert "cut.txt.zst: the compressed file is damaged or cut short" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")]
)
def test_missing_extra_is_named(tmp_path, model, capsys, monkeypatch, name, package):
    bad_text(tmp_path, name, b"x")
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["build", tmp_path, "--tokenizer", model, "--output", tmp_path / "out"]
    assert exit_code(corpus.main, *arguments) == 2
    error = capsys.readouterr().err
    assert f"{name}: reading" in error and f"{package}: pip install 'metro-ext[data]'" in error


def test_the_line_of_a_mistake_is_the_file_s_in_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_plan, "UNIT_BYTES", 50)
    for name, content, message in (
        ("a.jsonl", LINE * 40 + b"[1]\n", "line 41: expected a JSON object"),
        (
            "b.jsonl",
            LINE * 40 + b"\xff\n",
            f"line 41 is not valid UTF-8 (byte 0xff at offset {len(LINE) * 40})",
        ),
        (
            "c.txt",
            b"fine\n\n" * 40 + b"\xff\n",
            "line 81 is not valid UTF-8 (byte 0xff at offset 240)",
        ),
    ):
        file = bad_text(tmp_path, name, content)
        with pytest.raises(UserError, match=re.escape(message)):
            corpus_build.build_corpus([file], small_tokenizer(), tmp_path / "out", workers=2)
