import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from corpora import exit_code, make_corpus, real_text, small_tokenizer, start, wide_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from metro_ext import corpus as corpus_module
from metro_ext import corpus_format, text_files
from metro_ext.corpus import Corpus, unigram_cross_entropy
from metro_ext.corpus_build import build_corpus, unigram_entropy
from metro_ext.sample_text import sample_paths
from metro_ext.text_files import find_text_files, read_paragraphs

DOCUMENTS = ["one little girl\nand her dog", "a house", "the end of it\nall\nand more"]


def expected_stream(documents, tokenizer):
    stream = []
    for document in documents:
        ids = tokenizer.encode(document)
        if ids:
            stream += [tokenizer.bos_id, *ids, tokenizer.eos_id]
    return stream


def test_stream_documents_and_counts(tmp_path):
    tokenizer = small_tokenizer()
    corpus = make_corpus(tmp_path, DOCUMENTS, tokenizer)
    stream = expected_stream(DOCUMENTS, tokenizer)
    assert corpus.tokens(0, len(corpus)).tolist() == stream
    assert corpus.manifest.documents == 3
    assert corpus.manifest.tokens == len(corpus) == len(stream)
    assert corpus.manifest.text_bytes == sum(len(d.replace("\n", "")) for d in DOCUMENTS)
    assert corpus.manifest.dtype == "uint16"
    for i, document in enumerate(DOCUMENTS):
        assert corpus.document(i).tolist() == expected_stream([document], tokenizer)
    with pytest.raises(IndexError):
        corpus.document(3)
    corpus.verify()


def zstd(content):
    """Two frames, as `zstd a b` and parallel packers write them."""
    packer = pytest.importorskip("zstandard").ZstdCompressor()
    return packer.compress(content[:9]) + packer.compress(content[9:])


PACKERS = {"": lambda b: b, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def write_text(path, documents):
    """The documents in the format that the name says; in the field "body", if it has fields."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table({"id": range(len(documents)), "body": documents})
        pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=2)
        return
    if ".txt" in path.name:
        content = "\n\n \n".join(documents)
    else:
        content = "\n".join(json.dumps({"id": 1, "body": d}) for d in documents) + "\n\n"
    packed = path.suffix if path.suffix in PACKERS else ""
    path.write_bytes(PACKERS[packed](content.encode()))


@pytest.mark.parametrize("suffix", text_files.SUFFIXES)
def test_every_format_gives_the_same_corpus(tmp_path, suffix):
    tokenizer = small_tokenizer()
    file = tmp_path / f"text{suffix}"
    write_text(file, DOCUMENTS)
    build_corpus([file], tokenizer, tmp_path / "out", field="body")
    stream = Corpus.open(tmp_path / "out").tokens(0, len(expected_stream(DOCUMENTS, tokenizer)))
    assert stream.tolist() == expected_stream(DOCUMENTS, tokenizer)


def test_line_endings_and_byte_order_mark_are_no_text(tmp_path):
    plain, windows = tmp_path / "plain.txt", tmp_path / "windows.txt"
    plain.write_text("one\ntwo\n\nthree\n")
    windows.write_bytes("\ufeffone\r\ntwo\r\n\r\nthree\r\n".encode())
    assert list(read_paragraphs(windows)) == list(read_paragraphs(plain))


def test_folders_are_searched_in_order(tmp_path):
    for name in ("b/2.txt", "b/10.jsonl", "a.txt", "z.md", "c/d/e.txt.gz"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    names = [p.relative_to(tmp_path).as_posix() for p in find_text_files([tmp_path])]
    assert names == ["a.txt", "b/10.jsonl", "b/2.txt", "c/d/e.txt.gz"]


def test_a_file_ends_a_document_and_empty_documents_are_dropped(tmp_path):
    tokenizer = small_tokenizer()
    (tmp_path / "a.txt").write_text("\n\none\n\n\n\u200b\n\n \n")  # a zero-width space: no token
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n{"text": " \\n\\n "}\n{"text": "a\\n\\nb"}\n')
    assert tokenizer.encode("\u200b") == []
    manifest = build_corpus([tmp_path], tokenizer, tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    expected = expected_stream(["one", "two", "a b"], tokenizer)
    assert corpus.tokens(0, len(corpus)).tolist() == expected
    assert manifest.documents == 3


@pytest.mark.parametrize("form", [".txt", ".jsonl"])
@pytest.mark.parametrize("limit", [8, 13, 64])
def test_long_lines_are_cut_without_changing_a_token(tmp_path, monkeypatch, form, limit):
    tokenizer = small_tokenizer()
    words = ["the", "little", "girl", "naïve", "日本", "go", "a"]
    documents = [" ".join(words * 9), "short", " ".join(reversed(words * 5))]
    file = tmp_path / f"text{form}"
    if form == ".txt":
        file.write_text("\n\n".join(documents), encoding="utf-8")
    else:
        file.write_text("\n".join(json.dumps({"text": d}) for d in documents))
    monkeypatch.setattr(text_files, "PARAGRAPH_BYTES", limit)
    longest = max(len(paragraph.text) for paragraph in read_paragraphs(file))
    assert longest <= limit
    build_corpus([file], tokenizer, tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.tokens(0, len(corpus)).tolist() == expected_stream(documents, tokenizer)


@given(st.lists(st.sampled_from(["a", " ", "é", "日", "🙂", "\n"]), min_size=1, max_size=60))
def test_cutting_long_lines_loses_no_character(letters):
    text = "".join(letters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PARAGRAPH_BYTES", 8)
        lines = list(text_files._read_lines(io.BytesIO(text.encode()), Path("t.txt")))
    assert "".join(piece for _, piece, _ in lines) == text.replace("\n", "")
    assert [piece for _, piece, whole in lines if whole and not piece] == [
        line for line in text.removesuffix("\n").split("\n") if not line
    ]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("part_bytes", [1, 2, 7, 40, 1000])
def test_the_parts_of_a_file_are_the_file(tmp_path, monkeypatch, suffix, part_bytes):
    """Wherever it is cut: in a line, between documents, in a character, in a run of blank lines."""
    monkeypatch.setattr(text_files, "PARAGRAPH_BYTES", 16)
    documents = ["a b\nc", "é日🙂" * 9, "word " * 20 + "\nlast", "x", "   y\r\n z"]
    file = tmp_path / f"text{suffix}"
    write_text(file, documents * 3)
    if suffix == ".txt":
        file.write_bytes(b"\n\n" + file.read_bytes() + b"\n \n\n")
    parts = text_files.file_parts(file, part_bytes)
    assert len(parts) > 1 or part_bytes > 40
    found = [p for part in parts for p in read_paragraphs(file, "body", part)]
    assert found == list(read_paragraphs(file, "body"))
    assert sum(paragraph.starts_document for paragraph in found) == 15


@pytest.mark.parametrize("shard_tokens", [1, 7, 1000])
def test_shards_are_one_stream(tmp_path, shard_tokens):
    tokenizer = small_tokenizer()
    corpus = make_corpus(tmp_path, DOCUMENTS, tokenizer, shard_tokens=shard_tokens)
    stream = np.array(expected_stream(DOCUMENTS, tokenizer))
    sizes = [shard.tokens for shard in corpus.manifest.shards]
    assert all(size == shard_tokens for size in sizes[:-1]) and sum(sizes) == len(stream)
    for start_ in range(len(stream)):
        for length in range(len(stream) - start_ + 1):
            found = corpus.tokens(start_, length)
            np.testing.assert_array_equal(found, stream[start_ : start_ + length])
    for outside in ((-1, 2), (0, len(stream) + 1), (len(stream), 1)):
        with pytest.raises(IndexError):
            corpus.tokens(*outside)
    corpus.verify()


def test_more_than_65536_ids_take_four_bytes(tmp_path):
    tokenizer = wide_tokenizer()
    assert tokenizer.vocab_size > 65536
    corpus = make_corpus(tmp_path, ["".join(map(chr, range(0x20000, 0x2A6D0, 97)))], tokenizer)
    assert corpus.manifest.dtype == "uint32"
    ids = corpus.document(0)
    assert ids.dtype == np.uint32 and ids.max() > 65535
    size = (corpus.folder / "shard-00000.bin").stat().st_size
    assert size == 4 * len(corpus)


def test_unigram_figures(tmp_path):
    tokenizer = small_tokenizer()
    corpus = make_corpus(tmp_path, DOCUMENTS * 3, tokenizer)
    stream = expected_stream(DOCUMENTS * 3, tokenizer)
    counts = corpus.unigram_counts()
    assert counts.tolist() == [stream.count(i) for i in range(tokenizer.vocab_size)]
    content = [i for i in stream if i not in tokenizer.special_ids]
    p = np.array([content.count(i) / len(content) for i in set(content)])
    assert corpus.manifest.unigram_entropy_nats == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)


def test_unigram_entropy_and_cross_entropy_by_hand():
    counts = np.array([9, 2, 1, 1])  # id 0 is special: p = 1/2, 1/4, 1/4
    assert unigram_entropy(counts, [0]) == pytest.approx(1.5 * np.log(2), rel=1e-12)
    assert unigram_entropy(np.array([5, 7, 0, 0]), [0]) == 0
    # add one: 3/7, 2/7, 2/7
    heldout = np.array([4, 1, 0, 1])
    expected = (np.log(7 / 3) + np.log(7 / 2)) / 2
    assert unigram_cross_entropy(counts, heldout, [0]) == pytest.approx(expected, rel=1e-12)


def test_info_prints_the_manifest(tmp_path, capsys):
    corpus = make_corpus(tmp_path, DOCUMENTS, small_tokenizer())
    assert exit_code(corpus_module.main, "info", corpus.folder, "--verify") == 0
    out = capsys.readouterr().out
    assert re.search(r"documents +3\n", out)
    assert re.search(rf"tokens +{len(corpus)}\n", out)
    assert corpus.manifest.tokenizer_sha256 in out
    assert "checksums" in out


def test_a_corpus_can_be_moved(tmp_path):
    corpus = make_corpus(tmp_path, DOCUMENTS, small_tokenizer())
    shutil.move(corpus.folder, tmp_path / "elsewhere")
    Corpus.open(tmp_path / "elsewhere", small_tokenizer()).verify()


# The peak of this program alone: ru_maxrss would count what the parent held when it forked.
BUILD_AND_REPORT_PEAK = """
import sys
from metro_ext import corpus, corpus_parts
corpus_parts._BATCH_CHARACTERS = 1 << 19  # both texts are several batches long
corpus.main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """One document on one line without a break: the hardest case for a reader of lines."""
    model = tmp_path / "t.model"
    small_tokenizer().save(model)
    line = sample_paths()[0].read_text(encoding="utf-8").replace("\n", " ")
    peaks = []
    for repeats in (4, 12):
        text = tmp_path / f"{repeats}.txt"
        text.write_text(line * repeats, encoding="utf-8")
        arguments = ["build", text, "--tokenizer", model, "--output", tmp_path / str(repeats)]
        process = start("-c", BUILD_AND_REPORT_PEAK, *arguments, stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=120)
        peaks.append(float(out.splitlines()[-1]))
    # The text grew by 7 MB, its ids as Python integers by some 50 MB.
    assert peaks[1] - peaks[0] < 8


OLD_MANIFEST_KEYS = ("counts_sha256", "duplicates")


def test_a_corpus_of_format_version_1_is_read(tmp_path):
    corpus = make_corpus(tmp_path, DOCUMENTS * 3, small_tokenizer())
    path = corpus.folder / "manifest.json"
    body = json.loads(path.read_text())
    body = {k: v for k, v in body.items() if k not in (*OLD_MANIFEST_KEYS, "sha256")}
    body["version"] = 1
    body["sha256"] = corpus_format._checksum(body)
    path.write_text(json.dumps(body))
    (corpus.folder / "counts.bin").unlink()
    old = Corpus.open(corpus.folder)
    old.verify()
    assert old.manifest.duplicates is None
    assert old.unigram_counts().tolist() == corpus._count().tolist()


def test_real_text(tmp_path):
    text = real_text("books-valid.txt.xz")
    books = [book for book in re.split(r"\n\n+", text) if book.strip()]
    (tmp_path / "books.txt").write_text(text, encoding="utf-8")
    tokenizer = small_tokenizer(cased=True)
    build_corpus([tmp_path / "books.txt"], tokenizer, tmp_path / "out", shard_tokens=50_000)
    corpus = Corpus.open(tmp_path / "out", tokenizer)
    corpus.verify()
    assert corpus.manifest.documents == len(books) == 11
    for i, book in enumerate(books):
        assert corpus.document(i).tolist() == expected_stream([book], tokenizer)
