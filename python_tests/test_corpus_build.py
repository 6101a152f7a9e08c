"""A build on any number of processes, killed at any time, gives one corpus, byte for byte."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import exit_code, make_corpus, same_files, small_tokenizer, start
from hypothesis import given, settings
from hypothesis import strategies as st

from metro_ext import corpus as corpus_module
from metro_ext import corpus_dedup, corpus_parts, corpus_plan, corpus_workers
from metro_ext.corpus import Corpus
from metro_ext.corpus_build import build_corpus, work_folder
from metro_ext.corpus_shards import shard_tasks
from metro_ext.errors import UserError
from metro_ext.sample_text import sample_paths

SHARD = 5000


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files of several kinds and sizes, which make several units of 20000 bytes."""
    folder = tmp_path_factory.mktemp("texts")
    lines = sample_paths()[0].read_text(encoding="utf-8")[:150_000].splitlines()
    documents = ["\n".join(lines[i : i + 9]) for i in range(0, len(lines), 9)]
    (folder / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    records = [json.dumps({"text": document}) for document in documents[::2]]
    (folder / "b.jsonl").write_text("\n".join(records))
    for i in range(5):
        (folder / f"c{i}.txt").write_text(f"number {i}\n\nthe little girl\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(corpus_plan, "UNIT_BYTES", 20_000)


@pytest.fixture(scope="module")
def expected(texts, tmp_path_factory):
    """The corpus of one process and one unit a file."""
    folder = tmp_path_factory.mktemp("expected") / "out"
    build_corpus([texts], small_tokenizer(), folder, shard_tokens=SHARD, workers=1)
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_and_units(texts, expected, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(corpus_plan, "UNIT_BYTES", 7000)
    shares = []
    build_corpus(
        [texts], small_tokenizer(), tmp_path / "out", SHARD, workers=workers,
        progress=lambda tokens, share: shares.append(share),
    )  # fmt: skip
    assert same_files(tmp_path / "out", expected)
    assert sorted(shares) == shares and shares[-1] == 1 and len(shares) > 12
    assert not list(tmp_path.glob(".*"))
    Corpus.open(tmp_path / "out").verify()


@pytest.mark.parametrize(("limit", "value"), [("_BATCH_CHARACTERS", 500), ("_BATCH_PARAGRAPHS", 3)])
def test_small_batches_write_the_same_corpus(texts, expected, tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(corpus_parts, limit, value)
    monkeypatch.setattr(corpus_parts, "_DOCUMENTS_AT_ONCE", 7)
    build_corpus([texts], small_tokenizer(), tmp_path / "out", SHARD, workers=1)
    assert same_files(tmp_path / "out", expected)


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 25))
def test_shards_cut_the_units_without_loss(kept, shard_tokens):
    tasks = list(shard_tasks(kept, shard_tokens))
    sources = [source for task in tasks for source in task.sources]
    assert [token for u, a, b in sources for token in ((u, i) for i in range(a, b))] == [
        (unit, i) for unit, count in enumerate(kept) for i in range(count)
    ]
    assert [task.tokens for task in tasks[:-1]] == [shard_tokens] * (len(tasks) - 1)
    assert all(task.tokens == sum(b - a for _, a, b in task.sources) for task in tasks)
    assert [task.index for task in tasks] == list(range(len(tasks)))


class Killed(BaseException):
    """Stands for a kill: nothing in a build may handle it."""


def stop_after(monkeypatch, owner, name, calls):
    """The function does its work `calls` times and then ends the build."""
    original, count = getattr(owner, name), [0]

    def counted(*arguments, **options):
        if count[0] == calls:
            raise Killed
        count[0] += 1
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (corpus_workers, "encode_unit", 0),
        (corpus_workers, "encode_unit", 5),
        (corpus_workers, "write_shard", 0),
        (corpus_workers, "write_shard", 4),
        (corpus_parts, "sha256_file", 4),
        ("metro_ext.corpus_build", "write_manifest", 0),
    ],
)
def test_a_stopped_build_goes_on(texts, expected, tmp_path, monkeypatch, owner, name, calls):
    if isinstance(owner, str):
        owner = pytest.importorskip(owner)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, owner, name, calls)
        build_corpus([texts], small_tokenizer(), out, SHARD, workers=1)
    assert not out.exists() and work_folder(out).is_dir()
    if name == "write_shard":  # what is done is not done again
        monkeypatch.setattr(corpus_parts, "_batches", None)
    build_corpus([texts], small_tokenizer(), out, SHARD, workers=1)
    assert same_files(out, expected)
    assert not list(tmp_path.glob(".*"))


def test_what_a_kill_after_the_rename_leaves_is_no_unfinished_build(
    texts, expected, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, shutil, "rmtree", 1)  # the first finds nothing to remove
        build_corpus([texts], small_tokenizer(), out, SHARD, workers=1)
    assert same_files(out, expected)
    out.rename(tmp_path / "moved")
    build_corpus([texts], small_tokenizer(), out, SHARD, workers=1)
    assert same_files(out, expected)


def start_build(texts, folder, *options):
    model = folder / "t.model"
    small_tokenizer().save(model)
    arguments = [texts, "--tokenizer", model, "--output", folder / "out", "--shard-tokens", SHARD]
    program = (
        "import sys; from metro_ext import corpus, corpus_plan; corpus_plan.UNIT_BYTES = 20_000; "
        "from metro_ext.command_line import run; run(corpus.main)"
    )
    return start("-c", program, "build", *arguments, *options, stderr=subprocess.PIPE)


def wait_for(folder, pattern, process):
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


@pytest.mark.parametrize("pattern", ["parts/*.json", "parts/00006.json", "corpus/shard-*.bin"])
def test_a_build_killed_by_sigkill_goes_on(texts, expected, tmp_path, pattern):
    process = start_build(texts, tmp_path, "--workers", 2)
    out = tmp_path / "out"
    wait_for(work_folder(out), pattern, process)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.stderr.close()
    assert not out.exists()
    again = start_build(texts, tmp_path, "--workers", 3)
    assert "going on with the build in" in again.communicate(timeout=120)[1]
    assert again.returncode == 0
    assert same_files(out, expected)


def test_a_killed_worker_is_told_and_gone_on_from(texts, expected, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"ended with code -9 \(out of memory\?\).*run the command"):
        build_corpus(
            [texts], small_tokenizer(), out, SHARD, workers=2,
            progress=lambda *_: os.kill(children()[0], signal.SIGKILL),
        )  # fmt: skip
    build_corpus([texts], small_tokenizer(), out, SHARD, workers=2)
    assert same_files(out, expected)


def children():
    tasks = f"/proc/{os.getpid()}/task"
    if not os.path.exists(tasks):
        pytest.skip("needs Linux's /proc")
    found = [Path(tasks, thread, "children").read_text() for thread in os.listdir(tasks)]
    return [int(child) for child in " ".join(found).split()]


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["parts/00003.ids", "parts/00003.docs", "parts/00003.json"])
def test_damaged_parts_are_made_again(texts, expected, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    stop(monkeypatch, texts, out, "write_shard", 0)
    damage(work_folder(out) / name)
    build_corpus([texts], small_tokenizer(), out, SHARD, workers=1)
    assert same_files(out, expected)


def stop(monkeypatch, texts, out, name, calls, **options):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, corpus_workers, name, calls)
        build_corpus([texts], small_tokenizer(), out, SHARD, workers=1, **options)


def test_damaged_shards_are_made_again_or_named(texts, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop(monkeypatch, texts, out, "write_shard", 1)
    damage(work_folder(out) / "corpus" / "shard-00000.bin")
    stop(monkeypatch, texts, out, "write_shard", 6)  # its unit was still there
    assert (work_folder(out) / "corpus" / "shard-00000.bin").read_bytes() == (
        expected / "shard-00000.bin"
    ).read_bytes()
    damage(work_folder(out) / "corpus" / "shard-00000.bin")
    with pytest.raises(UserError, match=r"shard-00000\.bin: damaged since it was written: remove"):
        build_corpus([texts], small_tokenizer(), out, SHARD, workers=1)


RECORDS = ["parts/00003.json", "parts/shard-00000.bin.json"]


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("content", [b"[" * 2000, b"3", b'{"tokens": 1}', None])
def test_damaged_records_are_made_again(texts, expected, tmp_path, monkeypatch, name, content):
    """None: a count that is no longer that of the files, their checksums as they were."""
    out = tmp_path / "out"
    stop(monkeypatch, texts, out, "write_shard", 1)
    path = work_folder(out) / name
    record = json.loads(path.read_bytes())
    path.write_bytes(content or json.dumps(record | {"tokens": record["tokens"] + 1}).encode())
    build_corpus([texts], small_tokenizer(), out, SHARD, workers=1)
    assert same_files(out, expected)


def test_changed_input_is_refused(tmp_path, monkeypatch):
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text("the little girl\n" * 2500)
    stop(monkeypatch, texts, out, "encode_unit", 2)
    file, status = texts / "0.txt", (texts / "0.txt").stat()
    file.write_text("the little boys\n" * 2500)
    with pytest.raises(UserError, match=r"0\.txt: the file changed since the build began.*remove"):
        build_corpus([texts], small_tokenizer(), out, SHARD)
    file.write_text("the little girl\n" * 2500)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    (texts / "9.txt").write_text("more")
    with pytest.raises(UserError, match=r"other files \(expected 4, found 5\): name the same"):
        build_corpus([texts], small_tokenizer(), out, SHARD)
    (texts / "9.txt").unlink()
    for options in ({"shard_tokens": 5}, {"field": "body"}, {"dedup": True}):
        with pytest.raises(UserError, match=f"unfinished build with another {next(iter(options))}"):
            build_corpus([texts], small_tokenizer(), out, **{"shard_tokens": SHARD, **options})
    with pytest.raises(UserError, match="another tokenizer_sha256"):
        build_corpus([texts], small_tokenizer(900), out, SHARD)
    build_corpus([texts], small_tokenizer(), out, SHARD)


def test_input_that_changes_during_the_build_is_noticed(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the little girl\n" * 9000)

    def change(tokens, share):
        text.write_text("x")

    with pytest.raises(UserError, match=r"text\.txt: the file changed since the build began"):
        build_corpus([text], small_tokenizer(), tmp_path / "out", workers=1, progress=change)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_two_builds_of_one_corpus_are_refused(texts, expected, tmp_path):
    out = tmp_path / "out"

    def second(tokens, share):
        with pytest.raises(UserError, match="another process is at work on this corpus"):
            build_corpus([texts], small_tokenizer(), out, SHARD, workers=1)

    build_corpus([texts], small_tokenizer(), out, SHARD, workers=1, progress=second)
    assert same_files(out, expected)


def test_a_plan_that_cannot_be_read(texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop(monkeypatch, texts, out, "encode_unit", 1)
    (work_folder(out) / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: the plan of an unfinished build cannot"):
        build_corpus([texts], small_tokenizer(), out, SHARD)


DUPLICATED = ["one little girl", "a house", "ONE little\ngirl", "", "a house", "a  house", "x"]


@pytest.mark.parametrize("documents_a_file", [1, 3, 1 << 20])
def test_dedup_keeps_the_first_of_equal_texts(tmp_path, monkeypatch, documents_a_file):
    monkeypatch.setattr(corpus_dedup, "_FILE_DOCUMENTS", documents_a_file)
    tokenizer = small_tokenizer()
    deduped = make_corpus(tmp_path / "1", DUPLICATED * 3, tokenizer, dedup=True)
    plain = make_corpus(tmp_path / "2", ["one little girl", "a house", "x"], tokenizer)
    assert deduped.tokens(0, len(deduped)).tolist() == plain.tokens(0, len(plain)).tolist()
    assert deduped.manifest.duplicates == 15 and plain.manifest.duplicates is None
    assert deduped.manifest.text_bytes == plain.manifest.text_bytes
    deduped.verify()


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.sampled_from([1, 2, 3]))
def test_dedup_against_a_set(tmp_path_factory, numbers, shards):
    """Over units, batches of documents and shards of odd sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_plan, "UNIT_BYTES", 64)
        patch.setattr(corpus_parts, "_DOCUMENTS_AT_ONCE", 3)
        patch.setattr(corpus_dedup, "_FILE_DOCUMENTS", 16)
        patch.setattr(corpus_dedup, "_BITS_AT_ONCE", 8)
        folder = tmp_path_factory.mktemp("dedup")
        documents = [f"number {n}" for n in numbers]
        corpus = make_corpus(
            folder, documents, small_tokenizer(), dedup=True, shard_tokens=7 * shards
        )
    unique = list(dict.fromkeys(documents))
    found = [corpus.document(i) for i in range(corpus.manifest.documents)]
    assert [small_tokenizer().decode(ids.tolist()) for ids in found] == unique
    assert corpus.manifest.duplicates == len(documents) - len(unique)
    corpus.verify()


def test_dedup_on_several_processes_and_after_a_kill(texts, tmp_path, monkeypatch):
    outs = [tmp_path / name for name in ("1", "2", "3")]
    inputs = [texts / "b.jsonl", texts]
    for out, workers in zip(outs[:2], (1, 3), strict=True):
        build_corpus(inputs, small_tokenizer(), out, SHARD, workers=workers, dedup=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, corpus_workers, "write_shard", 3)
        build_corpus(inputs, small_tokenizer(), outs[2], SHARD, workers=1, dedup=True)
    build_corpus(inputs, small_tokenizer(), outs[2], SHARD, workers=2, dedup=True)
    assert same_files(outs[0], outs[1]) and same_files(outs[0], outs[2])
    deduped = Corpus.open(outs[0])
    deduped.verify()
    documents = [deduped.document(i).tobytes() for i in range(deduped.manifest.documents)]
    assert len(set(documents)) == len(documents) and deduped.manifest.duplicates > 0


def test_counts_are_those_of_the_shards(expected):
    corpus = Corpus.open(expected)
    stream = corpus.tokens(0, len(corpus))
    counts = np.bincount(stream, minlength=corpus.manifest.vocab_size)
    assert corpus.unigram_counts().tolist() == counts.tolist()


def test_command_line_tells_of_duplicates(tmp_path, capsys):
    text, model = tmp_path / "text.txt", tmp_path / "t.model"
    text.write_text("a house\n\na house\n")
    small_tokenizer().save(model)
    arguments = ["build", text, "--tokenizer", model, "--output", tmp_path / "out", "--dedup"]
    assert exit_code(corpus_module.main, *arguments) == 0
    assert "1 documents (1 duplicates left out)" in capsys.readouterr().out
    assert exit_code(corpus_module.main, "info", tmp_path / "out") == 0
    assert "1 left out" in capsys.readouterr().out
    assert exit_code(corpus_module.main, *arguments, "--workers", 0) == 2
    capsys.readouterr()
