"""GLUE's and SuperGLUE's tasks: files, columns, labels, metrics, submissions.

GLUE: https://gluebenchmark.com (TSV files); SuperGLUE: https://super.gluebenchmark.com (JSON
lines). COPA is scored by the better of two rows, MultiRC by rows grouped into questions.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metro_ext.errors import UserError
from metro_ext.finetune import metrics
from metro_ext.finetune.examples import Example
from metro_ext.records import field, find_in, json_rows, label_index, number, tsv_rows
from metro_ext.text_files import COMPRESSIONS

BINARY = ("0", "1")
BOOLEAN = ("false", "true")
ENTAILMENT = ("entailment", "not_entailment")
THREE_WAY = ("contradiction", "entailment", "neutral")


@dataclass(frozen=True)
class Diagnostic:
    """A set without training data, which the model of a task answers where the file is there.

    files: below the data folder, the first that exists; columns: of its two texts.
    """

    output: str
    files: tuple[str, ...]
    columns: tuple[str, str]


@dataclass(frozen=True)
class Task:
    """One task.

    labels: in the order of the logits; empty for regression.
    read: (task, file, whether it has labels) -> examples.
    score: (examples, outputs [N, labels]) -> metrics, the first of which decides.
    columns: first text, second text or "", label; of a TSV, or fields of JSON lines.
    dev, test: names of the files; MNLI has two of each.
    outputs: names of the submission's files, one a test file; default: that of the folder.
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
    outputs: tuple[str, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    small: bool = False  # 10 epochs and a batch of 16, as published for the small tasks

    def load(self, data: Path, name: str, labelled: bool = True) -> list[Example]:
        """The examples of a file of the task's folder (or of ``data`` itself)."""
        return self._examples(find_in(data, self.folder, name), labelled)

    def load_tests(self, data: Path) -> dict[str, list[Example]]:
        """Name of the submission's file -> examples without labels."""
        outputs = self.outputs or (self.folder + Path(self.train).suffix,)
        found = {
            output: self.load(data, name, labelled=False)
            for output, name in zip(outputs, self.test, strict=True)
        }
        for extra in self.diagnostics:
            reader = dataclasses.replace(self, columns=(*extra.columns, ""))
            paths = (data / f"{name}{end}" for name in extra.files for end in COMPRESSIONS)
            if path := next((path for path in paths if path.is_file()), None):
                found[extra.output] = reader._examples(path, labelled=False)
        return found

    def _examples(self, path: Path, labelled: bool) -> list[Example]:
        found = list(self.read(self, path, labelled))
        if not found:
            raise UserError(f"{path}: expected examples of {self.name}, found none")
        return found


def _truth(examples: list[Example]) -> list:
    return [example.label for example in examples]


def _argmax(metric: Callable) -> Callable:
    return lambda examples, out: metric(_truth(examples), out.argmax(1).tolist())


def _regression(examples: list[Example], out: np.ndarray) -> dict[str, float]:
    return metrics.correlations(_truth(examples), out[:, 0].tolist())


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
    for place, (where, row) in enumerate(tsv_rows(path, headless, needed)):
        value: int | float | None = None
        if labelled and task.labels:
            value = label_index(where, task.labels, row[label])
        elif labelled:
            value = number(where, row[label], 0, 5, "a score")
        index = row.get("index") or row.get("id") or place
        yield Example(row[first], row[second] if second else None, value, index)


def _read_json(task: Task, path: Path, labelled: bool) -> Iterator[Example]:
    first, second, label = task.columns
    for where, record in json_rows(path):
        value = None
        if labelled:
            value = label_index(where, task.labels, field(where, record, label, str, bool, int))
        text, pair = field(where, record, first), field(where, record, second)
        if task.name == "wic":
            text = f"{field(where, record, 'word')}: {text}"
        yield Example(text, pair, value, field(where, record, "idx", int))


def _read_copa(task: Task, path: Path, labelled: bool) -> Iterator[Example]:
    joints = {"cause": "because", "effect": "so"}
    for where, record in json_rows(path):
        question = field(where, record, "question")
        if question not in joints:
            raise UserError(f"{where}: expected a question of cause, effect, found {question!r}")
        right = None
        if labelled:
            right = label_index(where, BINARY, field(where, record, "label", int))
        premise = f"{field(where, record, 'premise')} {joints[question]}"
        group = field(where, record, "idx", int)
        for choice in (0, 1):
            label = int(choice == right) if labelled else None
            text = field(where, record, f"choice{choice + 1}")
            yield Example(premise, text, label, choice, group)


def _read_multirc(task: Task, path: Path, labelled: bool) -> Iterator[Example]:
    for where, record in json_rows(path):
        passage = field(where, record, "passage", dict)
        text, index = field(where, passage, "text"), field(where, record, "idx", int)
        for question in field(where, passage, "questions", list):
            asked = field(where, question, "question")
            group = (index, field(where, question, "idx", int))
            for answer in field(where, question, "answers", list):
                label = None
                if labelled:
                    label = label_index(where, BINARY, field(where, answer, "label", int))
                pair = f"{asked} {field(where, answer, 'text')}"
                yield Example(text, pair, label, field(where, answer, "idx", int), group)


def _read_wsc(task: Task, path: Path, labelled: bool) -> Iterator[Example]:
    for where, record in json_rows(path):
        words = field(where, record, "text").split(" ")
        target = field(where, record, "target", dict)
        place = field(where, target, "span2_index", int)
        pronoun = field(where, target, "span2_text")
        if place < 0 or not " ".join(words[place:]).lower().startswith(pronoun.lower()):
            raise UserError(
                f"{where}: expected {pronoun!r} at word {place}, found "
                f"{' '.join(words[place : place + 1])!r}"
            )
        value = None
        if labelled:
            value = label_index(where, BOOLEAN, field(where, record, "label", bool))
        text = " ".join([*words[:place], "*", *words[place : place + 1], "*", *words[place + 1 :]])
        index = field(where, record, "idx", int)
        yield Example(text, field(where, target, "span1_text"), value, index)


def _super(
    name: str, folder: str, labels: tuple, score: Callable, columns: tuple = (), **rest: Any
) -> Task:
    read = rest.pop("read", _read_json)
    files: dict[str, Any] = {"train": "train.jsonl", "dev": ("val.jsonl",), "test": ("test.jsonl",)}
    return Task(name, folder, labels, read, score, columns, **files, **rest)


_ACCURACY, _F1 = _argmax(metrics.accuracy), _argmax(metrics.accuracy_and_f1)
_PAIR = ("sentence1", "sentence2", "label")
_MNLI: dict[str, Any] = {
    "dev": ("dev_matched.tsv", "dev_mismatched.tsv"),
    "test": ("test_matched.tsv", "test_mismatched.tsv"),
    "outputs": ("MNLI-m.tsv", "MNLI-mm.tsv"),
    "diagnostics": (
        Diagnostic("AX.tsv", ("AX/AX.tsv", "diagnostic/diagnostic.tsv"),
                   ("sentence1", "sentence2")),
    ),
}  # fmt: skip
_SUPER_DIAGNOSTICS = (
    Diagnostic("AX-b.jsonl", ("AX-b/AX-b.jsonl",), ("sentence1", "sentence2")),
    Diagnostic("AX-g.jsonl", ("AX-g/AX-g.jsonl",), ("premise", "hypothesis")),
)
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
               diagnostics=_SUPER_DIAGNOSTICS, small=True),
        _super("wic", "WiC", BOOLEAN, _ACCURACY, _PAIR, small=True),
        _super("wsc", "WSC", BOOLEAN, _ACCURACY, read=_read_wsc, small=True),
    )
}  # fmt: skip
