"""What is fuzzed: for each name a function of a scratch folder that gives a target of fuzz.py."""

import json
import random
from pathlib import Path

import fuzz
import torch
from corpora import make_corpus, small_tokenizer
from fuzz_operators import operators
from safetensors.torch import save

from metro_ext import checkpoint, corpus_format, mpnet
from metro_ext.atomic import sha256_file
from metro_ext.batches import BatchSource
from metro_ext.config import from_dict, load_config, to_dict, to_toml
from metro_ext.corpus import Corpus
from metro_ext.evaluate.blimp import read_pairs
from metro_ext.finetune.squad import read_answers, read_na_probabilities, read_predictions
from metro_ext.finetune.squad_files import read_questions
from metro_ext.finetune.tasks import TASKS
from metro_ext.monitor import read_records
from metro_ext.text_files import read_paragraphs
from metro_ext.tokenizer import Tokenizer


def configuration(folder: Path) -> fuzz.Target:
    path = folder / "config.toml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        config = load_config((), path)
        assert from_dict(to_dict(config)) == config

    return fuzz.by_mutation(
        check, to_toml(load_config()).encode(), b'preset = "base"\n[optim]\nlr=1'
    )


def command_line(folder: Path) -> fuzz.Target:
    def check(data: bytes) -> None:
        argv = [word.decode("utf-8", "surrogateescape") for word in data.split(b" ")]
        config = load_config(argv, known_options=("--config",))
        path = folder / "config.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        assert load_config((), path) == config

    return fuzz.by_mutation(
        check,
        b"--preset base --optim.lr 1e-3 --run.seed=5 --data.train=a.txt,b --data.cased --steps 9",
        b'--data.train=["a","b"] --model.hidden=64 --model.heads 4 --objective electra',
    )


def _corpus(folder: Path) -> Path:
    documents = ["one little girl and her dog"] * 30
    return make_corpus(folder, documents, small_tokenizer(), shard_tokens=100).folder


def _use(corpus: Corpus) -> None:
    corpus.unigram_counts()
    for index in range(0, corpus.manifest.documents, 7):
        corpus.document(index)
    source = BatchSource(corpus, 32, 16, seed=1)
    source.batch(0)
    source.documents(3)


def manifest(folder: Path) -> fuzz.Target:
    made = _corpus(folder)
    path = made / "manifest.json"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        _use(Corpus.open(made))

    return fuzz.by_mutation(check, path.read_bytes())


def signed_manifest(folder: Path) -> fuzz.Target:
    """Manifests whose checksum holds: what a careless writer could have made."""
    made = _corpus(folder)
    path = made / "manifest.json"

    def check(data: bytes) -> None:
        try:
            body = json.loads(data)
            body.pop("sha256", None)
            body["sha256"] = corpus_format._checksum(body)
            path.write_text(json.dumps(body))
        except (ValueError, AttributeError, TypeError, RecursionError):
            path.write_bytes(data)
        _use(Corpus.open(made))

    return fuzz.by_mutation(check, path.read_bytes())


def shards(folder: Path) -> fuzz.Target:
    made = _corpus(folder)
    good = {name: (made / name).read_bytes() for name in ("shard-00000.bin", "documents.bin")}

    def target(chance: random.Random) -> None:
        name = chance.choice(list(good))
        data = fuzz.mutated(good[name], chance)
        if chance.random() < 0.8:  # of the right size: past the first check
            data = data[: len(good[name])].ljust(len(good[name]), b"\0")
        fuzz.record(data)
        (made / name).write_bytes(data)
        try:
            opened = Corpus.open(made)
            _use(opened)
            opened.verify()
        finally:
            (made / name).write_bytes(good[name])

    return target


def tokenizer(folder: Path) -> fuzz.Target:
    path = folder / "t.model"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        loaded = Tokenizer.load(path)
        loaded.decode(loaded.encode("one little girl [MASK]", allow_mask=True))

    return fuzz.by_mutation(check, small_tokenizer(300).model)


def checkpoint_state(folder: Path) -> fuzz.Target:
    return _checkpoint(folder, "state.json")


def checkpoint_tensors(folder: Path) -> fuzz.Target:
    return _checkpoint(folder, "tensors.safetensors")


def _checkpoint(folder: Path, name: str) -> fuzz.Target:
    """Also with checksums that hold, so that the damage reaches the parser behind them."""
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros(5, dtype=torch.uint8)}
    saved = checkpoint.save_checkpoint(folder / "c", 7, tensors, {"x": [1, 2.5, "y"]})
    good = {n: (saved / n).read_bytes() for n in ("state.json", "tensors.safetensors")}

    def target(chance: random.Random) -> None:
        data = fuzz.mutated(good[name], chance)
        fuzz.record(data)
        (saved / name).write_bytes(data)
        if chance.random() < 0.7:
            _sign(saved)
        try:
            checkpoint.load_checkpoint(folder / "c")
        finally:
            for other, content in good.items():
                (saved / other).write_bytes(content)

    return target


def _sign(saved: Path) -> None:
    try:
        document = json.loads((saved / "state.json").read_bytes())
        document["tensors_sha256"] = sha256_file(saved / "tensors.safetensors")
        (saved / "state.json").write_bytes(checkpoint._encode(document))
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass  # no longer JSON of that kind: unsigned, then


def mpnet_checkpoint(folder: Path) -> fuzz.Target:
    good = {
        "config.json": b'{"model_type": "mpnet", "hidden_size": 16, "vocab_size": 30}',
        "model.safetensors": save({"mpnet.a": torch.ones(2, 2)}),
    }

    def target(chance: random.Random) -> None:
        for name, content in good.items():
            (folder / name).write_bytes(content)
        name = chance.choice(list(good))
        data = fuzz.mutated(good[name], chance)
        fuzz.record(data)
        (folder / name).write_bytes(data)
        mpnet.read_checkpoint(folder)

    return target


def records(folder: Path) -> fuzz.Target:
    path = folder / "metrics.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        read_records(path)

    return fuzz.by_mutation(check, b'{"step": 3, "loss": 1.5}\n{"step": 6, "loss": "nan"}\n' * 3)


def texts(folder: Path) -> fuzz.Target:
    plain = {
        ".txt": "a line\n\nanother é\n".encode() * 5,
        ".jsonl": b'{"text": "a document\\nof lines"}\n{"text": ""}\n' * 4,
    }
    seeds = {
        kind + packed: data
        for kind, content in plain.items()
        for packed, data in fuzz.compressed(content).items()
    }

    def target(chance: random.Random) -> None:
        suffix = chance.choice(list(seeds))
        data = fuzz.mutated(seeds[suffix], chance)
        fuzz.record(suffix.encode() + b" " + data)
        path = folder / f"text{suffix}"
        path.write_bytes(data)
        for _ in read_paragraphs(path):
            pass

    return target


TSV_LABELS = {"cola": "1", "sts-b": "2.5", "mnli": "neutral", "qnli": "entailment",
              "rte": "entailment"}  # fmt: skip


def tsv_tasks(folder: Path) -> fuzz.Target:
    seeds = {}
    for name, task in TASKS.items():
        if not str(task.train).endswith(".tsv"):
            continue
        first, second, label = task.columns
        columns = ["index", *filter(None, (first, second)), label]
        row = ["3", *["some words"] * (len(columns) - 2), TSV_LABELS.get(name, "1")]
        if name == "cola":
            columns, row = ["g", "1", "*", "Some words."], ["g", "0", "*", "Words."]
        seeds[name] = "\n".join("\t".join(line) for line in (columns, row, row, row, "")).encode()
    return _tasks(folder, seeds, "train.tsv")


def json_tasks(folder: Path) -> fuzz.Target:
    questions = [{"question": "q", "idx": 0, "answers": [{"text": "a", "idx": 0, "label": 1}]}]
    rows = {
        "boolq": {"question": "q", "passage": "p", "label": True, "idx": 0},
        "cb": {"premise": "p", "hypothesis": "h", "label": "neutral", "idx": 0},
        "copa": {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0,
                 "idx": 0},
        "multirc": {"passage": {"text": "t", "questions": questions}, "idx": 0},
        "wic": {"word": "w", "sentence1": "a w", "sentence2": "w b", "label": True, "idx": 0},
        "wsc": {"text": "Tom saw it there", "label": True, "idx": 0,
                "target": {"span1_text": "Tom", "span1_index": 0, "span2_text": "it",
                           "span2_index": 2}},
    }  # fmt: skip
    seeds = {name: (json.dumps(row) + "\n").encode() * 3 for name, row in rows.items()}
    return _tasks(folder, seeds, "train.jsonl")


def _tasks(folder: Path, seeds: dict[str, bytes], file: str) -> fuzz.Target:
    for name, seed in seeds.items():
        (folder / TASKS[name].folder).mkdir(exist_ok=True)
        (folder / TASKS[name].folder / file).write_bytes(seed)
        TASKS[name].load(folder, file)  # the seed itself is right

    def target(chance: random.Random) -> None:
        name = chance.choice(list(seeds))
        data = fuzz.mutated(seeds[name], chance)
        fuzz.record(name.encode() + b" " + data)
        (folder / TASKS[name].folder / file).write_bytes(data)
        TASKS[name].load(folder, file)

    return target


def squad(folder: Path) -> fuzz.Target:
    answers = [{"text": "girl", "answer_start": 11}]
    questions = [
        {"id": "q1", "question": "Who?", "answers": answers},
        {"id": "q2", "question": "Where?", "answers": []},
    ]
    document = {"data": [{"paragraphs": [{"context": "one little girl", "qas": questions}]}]}
    readers = {
        "questions": (read_questions, json.dumps(document).encode()),
        "answers": (read_answers, json.dumps(document).encode()),
        "predictions": (read_predictions, b'{"q1": "girl", "q2": ""}'),
        "na": (read_na_probabilities, b'{"q1": 0.25, "q2": 1}'),
    }

    def target(chance: random.Random) -> None:
        name = chance.choice(list(readers))
        read, seed = readers[name]
        data = fuzz.mutated(seed, chance)
        fuzz.record(name.encode() + b" " + data)
        path = folder / "squad.json"
        path.write_bytes(data)
        read(path)

    return target


def blimp(folder: Path) -> fuzz.Target:
    path = folder / "blimp.jsonl"
    row = {"sentence_good": "A is.", "sentence_bad": "A are.", "field": "f", "UID": "u",
           "linguistics_term": "t", "phenomenon": "p"}  # fmt: skip

    def check(data: bytes) -> None:
        path.write_bytes(data)
        read_pairs(path)

    return fuzz.by_mutation(check, (json.dumps(row) + "\n").encode() * 3)


TARGETS = {
    target.__name__: target
    for target in (
        configuration, command_line, manifest, signed_manifest, shards, tokenizer,
        checkpoint_state, checkpoint_tensors, mpnet_checkpoint, records, texts, tsv_tasks,
        json_tasks, squad, blimp, operators,
    )
}  # fmt: skip
