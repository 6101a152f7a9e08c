"""SQuAD's official score of a predictions file: ``python -m metro_ext.finetune.squad DATA PRED``.

Exact match and F1 as the scripts of SQuAD 1.1 (Rajpurkar et al., arXiv 1606.05250) and 2.0 (arXiv
1806.03822) define them: lower case, without ASCII punctuation, the articles a, an, the and extra
spaces; the best of the reference answers counts. A question without answer is right, in both
figures, where the prediction is empty, and wrong otherwise.
"""

import argparse
import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from metro_ext.command_line import run
from metro_ext.errors import UserError
from metro_ext.finetune.squad_files import Question, read_questions
from metro_ext.records import checked, read_json

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = frozenset(string.punctuation)


def normalise(text: str) -> str:
    """Lower case; then punctuation goes, then articles become spaces, then spaces are folded."""
    bare = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(truth: str, found: str) -> float:
    return float(normalise(truth) == normalise(found))


def f1(truth: str, found: str) -> float:
    """F1 of the bags of words; where either is empty, 1 if both are, else 0 (SQuAD 2.0)."""
    gold, guess = normalise(truth).split(), normalise(found).split()
    if not gold or not guess:
        return float(gold == guess)
    common = sum((Counter(gold) & Counter(guess)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(guess), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def read_answers(path: Path) -> dict[str, list[str]]:
    """`answer_texts` of a SQuAD 1.1 or 2.0 file."""
    return answer_texts(read_questions(path))


def answer_texts(questions: list[Question]) -> dict[str, list[str]]:
    """Question id -> reference answers; [""] for a question without answer.

    Answers that are empty after normalisation do not count, as in the official script.
    """
    return {
        question.index: [text for _, text in question.answers if normalise(text)] or [""]
        for question in questions
    }


def read_predictions(path: Path) -> dict[str, str]:
    """Question id -> answer text, of a predictions file; UserError for anything else."""
    return _read_map(path, str)


def read_na_probabilities(path: Path) -> dict[str, float]:
    """Question id -> probability of no answer; UserError for anything else."""
    return _read_map(path, int, float)


def _read_map(path: Path, *kinds: type) -> dict:
    document = checked(f"{path}", read_json(path), dict)
    for index, value in document.items():
        checked(f"{path}: question {index}", value, *kinds)
    return document


def question_scores(
    answers: dict[str, list[str]], predictions: dict[str, str]
) -> dict[str, tuple[float, float]]:
    """Question id -> (exact, F1), for the questions that have a prediction."""
    return {
        index: (max(exact(text, predictions[index]) for text in texts),
                max(f1(text, predictions[index]) for text in texts))
        for index, texts in answers.items() if index in predictions
    }  # fmt: skip


def score(answers: dict[str, list[str]], predictions: dict[str, str]) -> dict[str, float]:
    """Per cent of exact matches and mean F1 over all questions; a missing prediction is wrong."""
    per_question = question_scores(answers, predictions).values()
    return {
        name: 100 * sum(found[place] for found in per_question) / len(answers)
        for place, name in enumerate(("exact", "f1"))
    }


def best_thresholds(
    answers: dict[str, list[str]], predictions: dict[str, str], na: dict[str, float]
) -> dict[str, float]:
    """The official best figures over thresholds on the probability of no answer, and where.

    Questions whose probability is above the threshold count as left unanswered. As in the official
    script: from the surest answer on, an answered question adds its score, an unanswerable one
    costs 1 unless its prediction is empty; the first best threshold is kept, 0 for none answered.

    Args:
        predictions: the best span of each question, however unlikely.
        na: a probability for every question that has a prediction.
    """
    per_question = question_scores(answers, predictions)
    if missing := [index for index in per_question if index not in na]:
        raise UserError(f"question {missing[0]}: expected a probability of no answer, found none")
    found: dict[str, float] = {}
    for place, name in enumerate(("exact", "f1")):
        total = best = float(sum(texts == [""] for texts in answers.values()))
        threshold = 0.0
        for index in sorted(na, key=na.__getitem__):
            if index not in per_question:
                continue
            if answers[index] != [""]:
                total += per_question[index][place]
            elif predictions[index]:
                total -= 1
            if total > best:
                best, threshold = total, na[index]
        found |= {f"best_{name}": 100 * best / len(answers), f"best_{name}_thresh": threshold}
    return found


def apply_threshold(
    predictions: dict[str, str], na: dict[str, float], threshold: float
) -> dict[str, str]:
    """Predictions that are empty where the probability of no answer is above the threshold."""
    return {
        index: "" if na.get(index, 0.0) > threshold else text for index, text in predictions.items()
    }


def split_scores(answers: dict[str, list[str]], predictions: dict[str, str]) -> dict[str, float]:
    """`score`, and, where some have no answer, that of each kind under the official names."""
    found = score(answers, predictions)
    if all(texts != [""] for texts in answers.values()):
        return found
    for name, empty in (("HasAns", False), ("NoAns", True)):
        if part := {i: texts for i, texts in answers.items() if (texts == [""]) == empty}:
            found |= {f"{name}_{k}": v for k, v in score(part, predictions).items()}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.finetune.squad",
        description="Exact match and F1 of predictions on a SQuAD file.",
    )
    parser.add_argument("data", type=Path, help="dev-v1.1.json or dev-v2.0.json, plain or .xz")
    parser.add_argument("predictions", type=Path, help="JSON: question id -> answer text")
    no_answer = "JSON: question id -> probability of no answer; adds the best thresholds (2.0)"
    parser.add_argument("--na-prob", type=Path, metavar="FILE", help=no_answer)
    above = "probability above which a question counts as unanswered"
    parser.add_argument("--na-threshold", type=float, default=1.0, metavar="P", help=above)
    options = parser.parse_args(argv)
    answers, predictions = read_answers(options.data), read_predictions(options.predictions)
    if not options.na_prob:
        print(json.dumps(split_scores(answers, predictions)))
        return
    na = read_na_probabilities(options.na_prob)
    final = apply_threshold(predictions, na, options.na_threshold)
    try:
        best = best_thresholds(answers, predictions, na)
    except UserError as error:
        raise UserError(f"{options.na_prob}: {error}") from None
    print(json.dumps(split_scores(answers, final) | best))


if __name__ == "__main__":
    run(main)
