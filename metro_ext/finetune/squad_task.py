"""Extractive question answering: training on windows, the best span over them, what is written."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from metro_ext.atomic import atomic_write
from metro_ext.errors import UserError
from metro_ext.finetune import squad
from metro_ext.finetune.job import Job, Result
from metro_ext.finetune.loop import EVALUATION_BATCH, Settings, defaults, train
from metro_ext.finetune.span_head import SpanModel, export_span_model
from metro_ext.finetune.squad_files import Question, Window, read_questions, windows
from metro_ext.pretrained import Pretrained
from metro_ext.records import find
from metro_ext.text_encoder import EncodedTexts

ANSWER_TOKENS = 30  # the longest answer that is looked for, as in BERT's recipe


@dataclass(frozen=True)
class SquadTask:
    """SQuAD 1.1, whose every question has an answer, or 2.0, where the context may hold none.

    length, stride: of the windows; the model's sequence length limits both.
    """

    name: str
    version: str
    unanswerable: bool
    length: int = 384
    stride: int = 128
    tests_reason = "SQuAD's test sets are not public: predictions.json of the dev set is in DIR"

    def settings(self, hidden: int) -> Settings:
        return defaults(self.name, False, hidden)

    def load(self, data: Path, part: str) -> list[Question]:
        """part: ``train`` or ``dev``."""
        path = find(data, f"{part}-v{self.version}.json")
        questions = read_questions(path)
        if not self.unanswerable and (bare := [q for q in questions if not q.answers]):
            raise UserError(
                f"{path}: question {bare[0].index}: expected an answer, found none; files with "
                "unanswerable questions are squad2's"
            )
        return questions

    def windows(self, pretrained: Pretrained, questions: list[Question]) -> list[Window]:
        length = min(self.length, pretrained.config.model.sequence_length)
        return windows(pretrained.tokenizer, questions, length, self.stride)

    def finetune(self, job: Job, seed: int) -> Result:
        questions, dev = self.load(job.data, "train")[: job.limit], self.load(job.data, "dev")
        made = self.windows(job.pretrained, questions)
        targets = [window.target(questions[window.question]) for window in made]
        if not any(last > 0 for _, last in targets):
            raise UserError("expected an answer that lies whole in a window, found none")
        model = SpanModel(job.pretrained, seed).to(job.device)
        train(model, [(window.row,) for window in made], targets, job.settings, seed)
        found = best_spans(model, dev, self.windows(job.pretrained, dev), job.settings)
        return Result(model, {f"dev-v{self.version}.json": figures(self, dev, found)}, found)

    def write(self, job: Job, chosen: Result, out: Path) -> list[Path]:
        export_span_model(chosen.model, job.pretrained.tokenizer, out)
        (scores,) = chosen.scores.values()
        return write_predictions(self, chosen.found, scores, out)

    def load_tests(self, data: Path) -> NoReturn:
        raise UserError(self.tests_reason)

    def submit(self, job: Job, chosen: Result, tests: Any, out: Path) -> NoReturn:
        raise UserError(self.tests_reason)


TASKS = {
    "squad1": SquadTask("squad1", "1.1", unanswerable=False),
    "squad2": SquadTask("squad2", "2.0", unanswerable=True),
}


@dataclass(frozen=True)
class Found:
    """What a model says of each question id.

    spans: the best text, however unlikely.
    na: probability of no answer, a logistic of the difference between the scores of ``<s>`` and of
        the best span; the scores are sums of two logits.
    """

    spans: dict[str, str]
    na: dict[str, float]


def figures(task: SquadTask, questions: list[Question], found: Found) -> dict[str, float]:
    """F1 and exact match; for 2.0 at the threshold of the best F1, and the official best ones."""
    answers = squad.answer_texts(questions)
    if not task.unanswerable:
        scores = squad.score(answers, found.spans)
        return {"f1": scores["f1"], "exact": scores["exact"]}
    best = squad.best_thresholds(answers, found.spans, found.na)
    final = squad.apply_threshold(found.spans, found.na, best["best_f1_thresh"])
    scores = squad.split_scores(answers, final)
    return {"f1": scores.pop("f1"), "exact": scores.pop("exact")} | scores | best


@torch.no_grad()
def best_spans(
    model: SpanModel, questions: list[Question], made: list[Window], settings: Settings
) -> Found:
    """The span of the highest score over the windows of each question.

    The score of no answer is the lowest of its windows', as in BERT's recipe: one window that is
    sure to hold the answer is enough.
    """
    model.eval()
    device = next(model.parameters()).device
    best = np.full(len(questions), -np.inf)
    null = np.full(len(questions), np.inf)
    texts = [""] * len(questions)
    for start in range(0, len(made), EVALUATION_BATCH):
        batch = made[start : start + EVALUATION_BATCH]
        rows = [window.row for window in batch]
        packed = EncodedTexts.pack(rows, max(map(len, rows)), device=device)
        logits = model(packed.tokens, packed.packing, settings.dtype).cpu()
        for window, own in zip(batch, logits.split(packed.lengths), strict=True):
            place, question = window.question, questions[window.question]
            null[place] = min(null[place], float(own[0].sum()))
            score, characters = best_span(window, own.numpy())
            if score > best[place]:
                best[place] = score
                texts[place] = question.context[characters]
    odds = np.clip(null - best, -700, 700)  # exp() stays finite
    na = 1 / (1 + np.exp(-odds))
    names = [question.index for question in questions]
    return Found(dict(zip(names, texts, strict=True)), dict(zip(names, na.tolist(), strict=True)))


def best_span(window: Window, logits: np.ndarray) -> tuple[float, slice]:
    """Score and characters of the best span of a window; -inf where it shows no character.

    Args:
        logits: float32 [tokens of the window's row, 2].
    """
    count = len(window.spans)
    if not window.visible.any():
        return -np.inf, slice(0, 0)
    own = np.where(window.visible[:, None], logits[window.first : window.first + count], -np.inf)
    scores = own[:, None, 0] + own[None, :, 1]
    band = np.tri(count, k=ANSWER_TOKENS - 1, dtype=bool) & np.tri(count, dtype=bool).T
    scores = np.where(band, scores, -np.inf)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), slice(int(window.spans[first, 0]),
                                             int(window.spans[last, 1]))  # fmt: skip


def write_predictions(
    task: SquadTask, found: Found, scores: dict[str, float], folder: Path
) -> list[Path]:
    """``predictions.json`` as the official script takes it; for 2.0 also what sets a threshold.

    In 2.0 ``predictions.json`` is empty where the threshold of the best F1 says that there is no
    answer; ``na_prob.json`` and ``spans.json`` (the best span of each question) are what the
    official script's ``--na-prob-file`` expects.
    """
    documents: dict[str, dict] = {"predictions.json": found.spans}
    if task.unanswerable:
        final = squad.apply_threshold(found.spans, found.na, scores["best_f1_thresh"])
        documents = {
            "predictions.json": final, "spans.json": found.spans, "na_prob.json": found.na,
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        with atomic_write(folder / name, "w") as file:
            file.write(json.dumps(document, ensure_ascii=False, indent=0) + "\n")
    return [folder / name for name in documents]
