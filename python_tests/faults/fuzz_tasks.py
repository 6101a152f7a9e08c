"""Targets of fuzz.py: files of tasks and of what answers them."""

import json
import random
from pathlib import Path

import fuzz

from metro_ext.evaluate.blimp import read_pairs
from metro_ext.finetune.squad import read_answers, read_na_probabilities, read_predictions
from metro_ext.finetune.squad_files import read_questions
from metro_ext.finetune.tasks import TASKS

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
