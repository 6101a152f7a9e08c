"""SQuAD's official JSON, plain or .xz, and the stride windows that a model reads it in."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metro_ext.errors import UserError
from metro_ext.records import checked, field, read_json
from metro_ext.tokenizer import Tokenizer

QUESTION_TOKENS = 64  # a longer question is cut, as in BERT's SQuAD recipe


@dataclass(frozen=True)
class Question:
    """One question on a context.

    answers: (first character in the context, text) of each reference answer; empty where the
        context holds none (SQuAD 2.0), or where the file has no labels.
    """

    index: str
    text: str
    context: str
    answers: tuple[tuple[int, str], ...]


def read_questions(path: Path, labelled: bool = True) -> list[Question]:
    """The questions of a SQuAD 1.1 or 2.0 file, in its order.

    Args:
        labelled: whether every question must have a list of answers (it may be empty).

    Raises:
        UserError: a missing field, one of another type, an id that comes twice, or an answer that
            is not where its context should have it; file, place and question id are named.
    """
    found: dict[str, Question] = {}
    document = checked(f"{path}: the document", read_json(path), dict)
    for a, article in enumerate(field(f"{path}: the document", document, "data", list)):
        where = f"{path}: data[{a}]"
        for p, paragraph in enumerate(field(where, article, "paragraphs", list)):
            inner = f"{where}.paragraphs[{p}]"
            context = field(inner, paragraph, "context")
            for q, record in enumerate(field(inner, paragraph, "qas", list)):
                index = field(f"{inner}.qas[{q}]", record, "id")
                if index in found:
                    raise UserError(f"{path}: question {index}: expected each id once, found twice")
                where_asked = f"{path}: question {index}"
                found[index] = _question(where_asked, index, context, record, labelled)
    if not found:
        raise UserError(f"{path}: expected questions, found none")
    return list(found.values())


def _question(where: str, index: str, context: str, record: dict, labelled: bool) -> Question:
    answers = []
    for answer in field(where, record, "answers", list) if labelled else []:
        start = field(where, answer, "answer_start", int)
        text = field(where, answer, "text")
        there = context[max(0, start) : max(0, start) + len(text)]
        if start < 0 or there != text:
            raise UserError(
                f"{where}: expected the answer {text!r} at character {start} of its context, "
                f"found {there!r}"
            )
        answers.append((start, text))
    return Question(index, field(where, record, "question"), context, tuple(answers))


@dataclass(frozen=True)
class Window:
    """``<s> question </s></s> part of the context </s>``.

    question: its place in the list.
    row: the ids.
    first: place in ``row`` of the part's first token.
    spans: int64 [n, 2], the characters of the context that each of its n tokens stands for.
    """

    question: int
    row: list[int]
    first: int
    spans: np.ndarray

    def target(self, question: Question) -> tuple[int, int]:
        """First and last place in ``row`` of the first answer; (0, 0) if it is not all here."""
        if not question.answers:
            return 0, 0
        start, text = question.answers[0]
        covers = self.covers(start, start + len(text))
        if not covers.any() or self.spans[0, 0] > start:
            return 0, 0
        if self.spans[:, 1].max() < start + len(text.rstrip()):
            return 0, 0
        places = np.flatnonzero(covers)
        return self.first + int(places[0]), self.first + int(places[-1])

    def covers(self, start: int, stop: int) -> np.ndarray:
        """bool [n]: the tokens that stand for some of the characters start ... stop - 1."""
        return (self.spans[:, 1] > start) & (self.spans[:, 0] < stop) & self.visible

    @property
    def visible(self) -> np.ndarray:
        """bool [n]: not a bare space, which stands for no character."""
        return self.spans[:, 1] > self.spans[:, 0]


def windows(
    tokenizer: Tokenizer, questions: list[Question], length: int, stride: int
) -> list[Window]:
    """The windows of all questions, in their order: at least one each.

    Args:
        length: the most tokens of a window.
        stride: context tokens from the start of one window to the next; half of what a window
            holds at most, so that windows overlap on short models too.
    """
    if length < 16 or stride < 1:
        raise UserError(
            f"expected windows of at least 16 tokens and a stride of at least 1, found {length} "
            f"and {stride}"
        )
    made: list[Window] = []
    context: str | None = None
    ids: list[int] = []
    spans: np.ndarray = np.zeros((0, 2), np.int64)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    for place, question in enumerate(questions):
        if question.context is not context:
            context = question.context
            ids, spans = tokenizer.encode_with_spans(context)
        asked = tokenizer.encode(question.text)[: min(QUESTION_TOKENS, length // 2 - 4)]
        head = [bos, *asked, eos, eos]
        room = length - len(head) - 1
        step = min(stride, room // 2)
        start = 0
        while True:
            part = slice(start, start + room)
            made.append(Window(place, [*head, *ids[part], eos], len(head), spans[part]))
            if start + room >= len(ids):
                break
            start += step
    return made
