"""SuperGLUE's ReCoRD: which entity of a passage fills the gap of a query?

Zhang et al., arXiv 1810.12885. A row for each distinct entity: the passage, and the query with the
entity in its gap. The model gives each row one score; training is a softmax over one right entity
and some wrong ones, and the answer is the entity of the highest score.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metro_ext.errors import UserError
from metro_ext.finetune import squad
from metro_ext.finetune.examples import Row
from metro_ext.finetune.heads import Classifier, checked_loss, export_classifier, joined
from metro_ext.finetune.job import Job, Result
from metro_ext.finetune.loop import Settings, defaults, predict, train
from metro_ext.finetune.submission import write_json_lines
from metro_ext.model import Packing
from metro_ext.pretrained import Pretrained
from metro_ext.records import field, find_in, json_rows
from metro_ext.tokenizer import Tokenizer

PLACEHOLDER = "@placeholder"
# Entities a query in a training step, the right one among them: more would repeat the passage
# oftener without a new right answer.
CANDIDATES = 4
_HIGHLIGHT = re.compile(r"\s*@highlight\s*")


@dataclass(frozen=True)
class Query:
    """A query on a passage.

    candidates: the distinct texts of the entities, in their order.
    answers: the right texts; empty in a test set.
    """

    index: int
    passage: str
    text: str
    candidates: tuple[str, ...]
    answers: tuple[str, ...]


def read_queries(path: Path, labelled: bool = True) -> list[Query]:
    """The queries of a ReCoRD file, in its order.

    Raises:
        UserError: a missing field, an entity that does not lie in its passage, an answer that is
            not where the passage should have it, a query without gap; file and line are named.
    """
    found = [query for where, record in json_rows(path) for query in _of(where, record, labelled)]
    if not found:
        raise UserError(f"{path}: expected queries, found none")
    return found


def _of(where: str, record: dict, labelled: bool) -> Iterator[Query]:
    passage = field(where, record, "passage", dict)
    text = field(where, passage, "text")
    spans = field(where, passage, "entities", list)
    candidates = tuple(dict.fromkeys(_span(where, text, span) for span in spans))
    if not candidates:
        raise UserError(f"{where}: expected entities of the passage, found none")
    for asked in field(where, record, "qas", list):
        index = field(where, asked, "idx", int)
        query = field(where, asked, "query")
        if PLACEHOLDER not in query:
            raise UserError(f"{where}: query {index}: expected {PLACEHOLDER}, found {query:.60}")
        answers = []
        for answer in field(where, asked, "answers", list) if labelled else []:
            answers.append(field(where, answer, "text"))
            there = _span(where, text, answer)
            if squad.normalise(there) != squad.normalise(answers[-1]):
                raise UserError(
                    f"{where}: query {index}: expected the answer {answers[-1]!r} at characters "
                    f"{answer['start']} to {answer['end']} of its passage, found {there!r}"
                )
        if labelled and not answers:
            raise UserError(f"{where}: query {index}: expected answers, found none")
        yield Query(index, text, query, candidates, tuple(dict.fromkeys(answers)))


def _span(where: str, text: str, span: dict) -> str:
    """The characters start ... end, both included, as ReCoRD counts."""
    start, end = field(where, span, "start", int), field(where, span, "end", int)
    if not 0 <= start <= end < len(text):
        raise UserError(
            f"{where}: expected characters of the passage, 0 to {len(text) - 1}, found "
            f"{start} to {end}"
        )
    return text[start : end + 1]


def f1(truth: str, found: str) -> float:
    """F1 of the bags of words; 0 where they share none, two empty ones included."""
    return squad.f1(truth, found) if squad.normalise(truth) else 0.0


def score(queries: list[Query], found: list[str]) -> dict[str, float]:
    """F1 and exact match in per cent, each the best over a query's answers: the official metric."""
    return {
        name: 100 * float(np.mean([
            max(metric(answer, text) for answer in query.answers)
            for query, text in zip(queries, found, strict=True)
        ]))
        for name, metric in (("f1", f1), ("exact", squad.exact))
    }  # fmt: skip


class Rows:
    """Rows of queries; each passage is encoded once."""

    def __init__(self, tokenizer: Tokenizer, limit: int):
        self.tokenizer, self.limit = tokenizer, limit
        self._passage = ""
        self._ids: list[int] = []

    def of(self, query: Query, candidate: str) -> Row:
        if query.passage != self._passage:
            self._passage = query.passage
            self._ids = self.tokenizer.encode(_HIGHLIGHT.sub(" ", query.passage))
        asked = self.tokenizer.encode(query.text.replace(PLACEHOLDER, candidate))
        return joined(self.tokenizer, self._ids, asked, self.limit)

    def training(self, queries: list[Query], seed: int) -> list[list[Row]]:
        """For each query a right candidate, first, and up to ``CANDIDATES - 1`` wrong ones.

        Queries none of whose answers is an entity are passed over.
        """
        generator = np.random.default_rng(seed)
        made = []
        for query in queries:
            right = [c for c in query.candidates if c in query.answers]
            wrong = [c for c in query.candidates if c not in query.answers]
            if right:
                chosen = [right[generator.integers(len(right))]]
                chosen += generator.permutation(wrong)[: CANDIDATES - 1].tolist()
                made.append([self.of(query, candidate) for candidate in chosen])
        if not made:
            raise UserError("expected a query whose answer is an entity of its passage, found none")
        return made


class Ranker(Classifier):
    """A classifier with one output, trained to score the first row of a group highest."""

    def __init__(self, pretrained: Pretrained, seed: int):
        super().__init__(pretrained, 1, seed)

    def loss(
        self,
        tokens: Tensor,
        packing: Packing,
        labels: list[int],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> Tensor:
        """`first_of_group_loss` of the scores; labels: the rows of each group."""
        return first_of_group_loss(self(tokens, packing, dtype, generator)[:, 0], labels)


def first_of_group_loss(scores: Tensor, sizes: list[int]) -> Tensor:
    """Mean over the groups of -log softmax(scores of the group)[0].

    Args:
        scores: float32 [sum of the sizes].
    """
    padded = torch.nn.utils.rnn.pad_sequence(
        list(scores.split(sizes)), batch_first=True, padding_value=float("-inf")
    )
    target = torch.zeros(len(sizes), dtype=torch.long, device=scores.device)
    return checked_loss(F.cross_entropy(padded, target))


@dataclass(frozen=True)
class Record:
    """ReCoRD as a `metro_ext.finetune.job.Kind`."""

    name: str = "record"
    folder: str = "ReCoRD"
    tests_reason = ""

    def settings(self, hidden: int) -> Settings:
        return defaults(self.name, False, hidden)

    def load(self, data: Path, name: str, labelled: bool = True) -> list[Query]:
        return read_queries(find_in(data, self.folder, name), labelled)

    def finetune(self, job: Job, seed: int) -> Result:
        queries = self.load(job.data, "train.jsonl")[: job.limit]
        dev = self.load(job.data, "val.jsonl")
        groups = Rows(job.pretrained.tokenizer, job.length).training(queries, seed)
        model = Ranker(job.pretrained, seed).to(job.device)
        train(model, groups, [len(group) for group in groups], job.settings, seed)
        return Result(model, {"val.jsonl": score(dev, self.answers(job, model, dev))})

    def answers(self, job: Job, model: Ranker, queries: list[Query]) -> list[str]:
        """The likeliest entity of each query."""
        rows = Rows(job.pretrained.tokenizer, job.length)
        made = [rows.of(query, candidate) for query in queries for candidate in query.candidates]
        scores = predict(model, made, job.settings.dtype)[:, 0]
        ends = np.cumsum([len(query.candidates) for query in queries])
        parts = np.split(scores, ends[:-1])
        return [q.candidates[part.argmax()] for q, part in zip(queries, parts, strict=True)]

    def write(self, job: Job, chosen: Result, out: Path) -> list[Path]:
        export_classifier(chosen.model, job.pretrained.tokenizer, (), out)
        return []

    def load_tests(self, data: Path) -> list[Query]:
        return self.load(data, "test.jsonl", labelled=False)

    def submit(self, job: Job, chosen: Result, tests: list[Query], out: Path) -> list[Path]:
        found = self.answers(job, chosen.model.to(job.device), tests)
        records = [{"idx": q.index, "label": a} for q, a in zip(tests, found, strict=True)]
        return [write_json_lines(out / "ReCoRD.jsonl", records)]
