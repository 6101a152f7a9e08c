"""A run's own tokenizer and corpora are used only for the texts and settings that made them."""

import os
import shutil
from pathlib import Path

import pytest
from corpora import make_corpus, small_tokenizer
from training_runs import train

import metro_ext
from metro_ext import made_from
from metro_ext.config import load_config
from metro_ext.errors import UserError
from metro_ext.prepare import prepare
from metro_ext.sample_text import sample_paths


class Start:
    """Preparations of one run folder; `said` is what the last one told of."""

    def __init__(self, folder: Path):
        self.folder, self.said = folder, []
        words = sample_paths()[1].read_text(encoding="utf-8")
        self.texts = {name: folder / f"{name}.txt" for name in ("a", "b", "valid")}
        for i, path in enumerate(self.texts.values()):
            path.write_text(words[i * 9000 : (i + 1) * 9000], encoding="utf-8")
        self.run = folder / "run"

    def __call__(self, text="a", *options):
        self.said = []
        data = [f"--data.train={self.texts[text]}", f"--data.valid={self.texts['valid']}"]
        options = [f"--run={self.run}", "--data.vocab_size=400", *data, *options]
        return prepare(load_config(options), self.said.append)

    def checkpoint(self):
        (self.run / "checkpoints" / "step-00000001").mkdir(parents=True)

    def words(self, prepared) -> str:
        return prepared.tokenizer.decode(prepared.train.corpora[0].document(0))


@pytest.fixture
def start(tmp_path):
    return Start(tmp_path)


def first_words(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split()[:3]).casefold()


def test_the_same_text_is_prepared_once(start):
    start()
    assert [line.split()[0] for line in start.said] == ["training", "encoding", "encoding"]
    start()
    assert start.said == []


def test_another_text_is_encoded_anew(start):
    start("a")
    prepared = start("b")
    assert len(start.said) == 3  # another tokenizer, and so both corpora
    assert start.words(prepared).startswith(first_words(start.texts["b"]))
    assert start.words(start("a")).startswith(first_words(start.texts["a"]))


def test_a_text_that_changed_is_encoded_anew(start):
    start()
    before = start.texts["a"].stat()
    start.texts["a"].write_bytes(start.texts["a"].read_bytes()[::-1])  # as long as before
    os.utime(start.texts["a"], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    start()
    assert len(start.said) == 3


def test_another_held_out_text_leaves_the_rest(start):
    start()
    start.texts["valid"] = start.texts["b"]
    start()
    assert start.said == [f"encoding {start.texts['b']}"]


def test_a_text_that_is_only_touched_or_moved_is_not(start):
    start()
    os.utime(start.texts["a"], ns=(0, 0))
    start()
    assert start.said == []
    (start.folder / "elsewhere").mkdir()
    start.texts["a"] = start.texts["a"].rename(start.folder / "elsewhere" / "a.txt")
    start()
    assert start.said == []


@pytest.mark.parametrize("option", ["--data.vocab_size=420", "--data.cased=true"])
def test_another_vocabulary_is_trained_anew(start, option):
    before = start().tokenizer
    after = start("a", option).tokenizer
    assert before.sha256 != after.sha256 and (after.vocab_size == 420 or after.cased)
    assert len(start.said) == 3  # the tokenizer and both corpora


def test_a_named_tokenizer_takes_the_place_of_one_left_over(start):
    start()
    named = start.folder / "named.model"
    small_tokenizer(500).save(named)
    prepared = start("a", f"--data.tokenizer={named}")
    assert prepared.train.corpora[0].tokenizer.sha256 == small_tokenizer(500).sha256
    assert (start.run / "tokenizer.model").read_bytes() == named.read_bytes()
    assert start().tokenizer.vocab_size == 400  # and the other way round


def test_a_named_tokenizer_in_the_run_s_own_place(start):
    start.run.mkdir()
    own = start.run / "tokenizer.model"
    small_tokenizer(500).save(own)
    assert start("a", f"--data.tokenizer={own}").tokenizer.vocab_size == 500


def test_a_given_corpus_brings_its_tokenizer(start):
    start()
    corpus = make_corpus(start.folder / "c", ["one little girl and her dog"], small_tokenizer(500))
    data = [f"--data.train={corpus.folder}", f"--data.valid={corpus.folder}"]
    assert start("a", *data).tokenizer.vocab_size == 500
    assert (start.run / "tokenizer.model").read_bytes() == small_tokenizer(500).model


@pytest.mark.parametrize(
    ("text", "option", "message"),
    [
        ("b", "--seed=1", r"tokenizer\.model was made for .*the text was .*a\.txt and is .*b\.txt"),
        ("a", "--data.vocab_size=420", "data.vocab_size was 400 and is 420"),
        ("a", "--data.tokenizer={named}", "data.vocab_size was 400 and is not given"),
    ],
)
def test_with_a_checkpoint_another_source_is_refused(start, text, option, message):
    start()
    start.checkpoint()
    small_tokenizer(500).save(start.folder / "named.model")
    before = sorted(start.run.rglob("*"))
    with pytest.raises(UserError, match=message):
        start(text, option.format(named=start.folder / "named.model"))
    assert sorted(start.run.rglob("*")) == before


def test_with_a_checkpoint_a_changed_text_is_refused_and_a_missing_one_is_not(start):
    start()
    start.checkpoint()
    for path in start.texts.values():
        path.rename(path.with_suffix(".gone"))
    start()
    assert start.said == []
    for path in start.texts.values():
        path.with_suffix(".gone").rename(path)
    with start.texts["valid"].open("a") as file:
        file.write("more")
    with pytest.raises(UserError, match=r"data/valid was made for .*valid\.txt has changed"):
        start()


def test_nothing_is_deleted_on_a_guess(start):
    start()
    shutil.copytree(start.run, start.folder / "copy")
    for name in ("tokenizer.model", "data/train"):
        (start.run / (name + made_from.SUFFIX)).unlink()
        with pytest.raises(UserError, match=f"{name} is there already, and nothing tells"):
            start("b")
        assert (start.run / name).exists()
        shutil.rmtree(start.run)
        shutil.copytree(start.folder / "copy", start.run)
    # With a checkpoint that names the tokenizer and the corpora there is no need to know.
    (start.run / ("data/train" + made_from.SUFFIX)).unlink()
    start.checkpoint()
    start()
    assert start.said == []


def test_a_kill_between_record_and_text_leaves_no_false_record(start, monkeypatch):
    start("a")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("metro_ext.prepare.build_corpus", die)
    with pytest.raises(KeyboardInterrupt):
        start("b")
    assert not (start.run / "data" / "train").exists()
    monkeypatch.undo()
    assert start.words(start("b")).startswith(first_words(start.texts["b"]))


@pytest.mark.parametrize("content", ["{", "[" * 2000, '{"settings": 3, "texts": []}'])
def test_a_damaged_record(start, content):
    start()
    (start.run / ("tokenizer.model" + made_from.SUFFIX)).write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.model\.made_from\.json: damaged"):
        start()


def test_a_start_that_failed_does_not_decide_what_the_next_trains_on(start):
    """The whole way, with a tokenizer left over and another one named: it can be loaded after."""
    words = [f"--data.train={start.texts['a']}", f"--data.valid={start.texts['valid']}"]
    train(start.run, "--data.vocab_size=420", "--run.device=cuda", *words, code=2)
    start()
    small_tokenizer(500).save(start.folder / "named.model")
    named = f"--data.tokenizer={start.folder / 'named.model'}"
    train(start.run, "--steps", "1", *words, named)
    assert metro_ext.load(start.run).tokenizer.vocab_size == 500
