"""GLUE's and SuperGLUE's tasks: files, columns, labels, metrics, submissions.

GLUE: https://gluebenchmark.com (TSV files); SuperGLUE: https://super.gluebenchmark.com (JSON
lines). COPA is scored by the better of two rows, MultiRC by rows grouped into questions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metro_ext.errors import UserError
from metro_ext.finetune import metrics
from metro_ext.finetune.examples import (
    Example,
    field,
    find,
    json_rows,
    label_index,
    tsv_rows,
)

BINARY = ("0", "1")
BOOLEAN = ("false", "true")
ENTAILMENT = ("entailment", "not_entailment")
THREE_WAY = ("contradiction", "entailment", "neutral")


@dataclass(frozen=True)
class Task:
    """One task.

    labels: in the order of the logits; empty for regression.
    read: (task, file, whether it has labels) -> examples.
    score: (examples, outputs [N, labels]) -> metrics, the first of which decides.
    dev, test: names of the files; MNLI has two of each.
    submission: name of the file; columns of a TSV, or JSON lines.
    """

    name: str
    folder: str
    labels: tuple[str, ...]
    read: Callable[["Task", Path, bool], Iterator[Example]]
    score: Callable[[list[Example], np.ndarray], dict[str, float]]
    columns: tuple[str, ...] = ()
    train: str = "train.tsv"
    dev: tuple[str, ...] = ("dev.tsv",)
    test: tuple[str, ...] = ("test.tsv",)
    small: bool = False  # 10 epochs and a batch of 16, as published for the small tasks

    def load(self, data: Path, name: str, labelled: bool = True) -> list[Example]:
        """The examples of a file of the task's folder (or of ``data`` itself)."""
        folder = data / self.folder if (data / self.folder).is_dir() else data
        path = find(folder, name)
        found = list(self.read(self, path, labelled))
        if not found:
            raise UserError(f"{path}: expected examples of {self.name}, found none")
        return found


def _truth(examples: list[Example]) -> list:
    return [example.label for example in examples]


def _argmax(metric: Callable) -> Callable:
    return lambda examples, out: metric(_truth(examples), out.argmax(1).tolist())


def _regression(examples: list[Example], out: np.ndarray) -> dict[str, float]:
    return metrics.correlations(_truth(examples), out[:, 0])


def _grouped(examples: list[Example], out: np.ndarray) -> dict[str, float]:
    groups = [example.group for example in examples]
    return metrics.f1a_and_em(groups, _truth(examples), out.argmax(1).tolist())


def choices(examples: list[Example], out: np.ndarray) -> dict:
    """The place in the list of each group's likeliest choice, by the margin of label 1."""
    best: dict = {}
    margin = out[:, 1] - out[:, 0]
    for place, example in enumerate(examples):
        if example.group not in best or margin[place] > margin[best[example.group]]:
            best[example.group] = place
    return best


def _best_choice(examples: list[Example], out: np.ndarray) -> dict[str, float]:
    best = choices(examples, out)
    return {"accuracy": float(np.mean([examples[i].label == 1 for i in best.values()]))}


def _read_tsv(task: Task, path: Path, labelled: bool) -> Iterator[Example]:
    """``columns``: first text, second text or "", label."""
    first, second, label = task.columns
    headless = ["source", "label", "star", "sentence"] if task.name == "cola" and labelled else None
    needed = [name for name in (first, second, label if labelled else "") if name]
    for place, (number, row) in enumerate(tsv_rows(path, headless, needed)):
        value = None
        if labelled and task.labels:
            value = label_index(path, number, task.labels, row[label])
        elif labelled:
            try:
                value = float(row[label])
                if not 0 <= value <= 5:
                    raise ValueError
            except ValueError:
                raise UserError(
                    f"{path}: line {number}: expected a score from 0 to 5, found {row[label]!r}"
                ) from None
        index = row.get("index") or row.get("id") or place
        yield Example(row[first], row[second] if second else None, value, index)


def _read_json(task: Task, path: Path, labelled: bool) -> Iterator[Example]:
    first, second, label = task.columns
    for number, record in json_rows(path):
        value = None
        if labelled:
            found = field(path, number, record, label, (str, bool, int))
            value = label_index(path, number, task.labels, found)
        text, pair = field(path, number, record, first), field(path, number, record, second)
        if task.name == "wic":
            text = f"{field(path, number, record, 'word')}: {text}"
        yield Example(text, pair, value, field(path, number, record, "idx", int))


def _read_copa(task: Task, path: Path, labelled: bool) -> Iterator[Example]:
    joints = {"cause": "because", "effect": "so"}
    for number, record in json_rows(path):
        question = field(path, number, record, "question")
        if question not in joints:
            raise UserError(
                f"{path}: line {number}: expected a question of cause, effect, found {question!r}"
            )
        right = None
        if labelled:
            right = label_index(path, number, BINARY, field(path, number, record, "label", int))
        premise = f"{field(path, number, record, 'premise')} {joints[question]}"
        group = field(path, number, record, "idx", int)
        for choice in (0, 1):
            label = int(choice == right) if labelled else None
            text = field(path, number, record, f"choice{choice + 1}")
            yield Example(premise, text, label, choice, group)


def _read_multirc(task: Task, path: Path, labelled: bool) -> Iterator[Example]:
    for number, record in json_rows(path):
        passage = field(path, number, record, "passage", dict)
        text = field(path, number, passage, "text")
        for question in field(path, number, passage, "questions", list):
            asked = field(path, number, question, "question")
            place = field(path, number, question, "idx", int)
            group = (field(path, number, record, "idx", int), place)
            for answer in field(path, number, question, "answers", list):
                label = None
                if labelled:
                    found = field(path, number, answer, "label", int)
                    label = label_index(path, number, BINARY, found)
                pair = f"{asked} {field(path, number, answer, 'text')}"
                yield Example(text, pair, label, field(path, number, answer, "idx", int), group)


def _read_wsc(task: Task, path: Path, labelled: bool) -> Iterator[Example]:
    for number, record in json_rows(path):
        words = field(path, number, record, "text").split(" ")
        target = field(path, number, record, "target", dict)
        place = field(path, number, target, "span2_index", int)
        pronoun = field(path, number, target, "span2_text")
        if not " ".join(words[place:]).lower().startswith(pronoun.lower()):
            raise UserError(
                f"{path}: line {number}: expected {pronoun!r} at word {place}, found "
                f"{' '.join(words[place : place + 1])!r}"
            )
        value = None
        if labelled:
            found = field(path, number, record, "label", bool)
            value = label_index(path, number, BOOLEAN, found)
        text = " ".join([*words[:place], "*", *words[place : place + 1], "*", *words[place + 1 :]])
        yield Example(text, field(path, number, target, "span1_text"), value, record.get("idx"))


def _super(name: str, folder: str, labels: tuple, score: Callable, columns: tuple = (), **rest):
    read = rest.pop("read", _read_json)
    files = {"train": "train.jsonl", "dev": ("val.jsonl",), "test": ("test.jsonl",)}
    return Task(name, folder, labels, read, score, columns, **files, **rest)


_ACCURACY, _F1 = _argmax(metrics.accuracy), _argmax(metrics.accuracy_and_f1)
_PAIR = ("sentence1", "sentence2", "label")
_MNLI = {"dev": ("dev_matched.tsv", "dev_mismatched.tsv"),
         "test": ("test_matched.tsv", "test_mismatched.tsv")}  # fmt: skip
TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", BINARY, _read_tsv, _argmax(metrics.matthews),
             ("sentence", "", "label"), small=True),
        Task("sst-2", "SST-2", BINARY, _read_tsv, _ACCURACY, ("sentence", "", "label")),
        Task("mrpc", "MRPC", BINARY, _read_tsv, _F1, ("#1 String", "#2 String", "Quality"),
             small=True),
        Task("sts-b", "STS-B", (), _read_tsv, _regression, ("sentence1", "sentence2", "score"),
             small=True),
        Task("qqp", "QQP", BINARY, _read_tsv, _F1, ("question1", "question2", "is_duplicate")),
        Task("mnli", "MNLI", THREE_WAY, _read_tsv, _ACCURACY,
             ("sentence1", "sentence2", "gold_label"), **_MNLI),
        Task("qnli", "QNLI", ENTAILMENT, _read_tsv, _ACCURACY, ("question", "sentence", "label")),
        Task("rte", "RTE", ENTAILMENT, _read_tsv, _ACCURACY, _PAIR, small=True),
        Task("wnli", "WNLI", BINARY, _read_tsv, _ACCURACY, _PAIR, small=True),
        _super("boolq", "BoolQ", BOOLEAN, _ACCURACY, ("passage", "question", "label")),
        _super("cb", "CB", THREE_WAY, _argmax(metrics.accuracy_and_macro_f1),
               ("premise", "hypothesis", "label"), small=True),
        _super("copa", "COPA", BINARY, _best_choice, read=_read_copa, small=True),
        _super("multirc", "MultiRC", BINARY, _grouped, read=_read_multirc),
        _super("super-rte", "RTE", ENTAILMENT, _ACCURACY, ("premise", "hypothesis", "label"),
               small=True),
        _super("wic", "WiC", BOOLEAN, _ACCURACY, _PAIR, small=True),
        _super("wsc", "WSC", BOOLEAN, _ACCURACY, read=_read_wsc, small=True),
    )
}  # fmt: skip
