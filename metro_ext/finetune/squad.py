"""SQuAD's official score of a predictions file: ``python -m metro_ext.finetune.squad DATA PRED``.

Exact match and F1 as the scripts of SQuAD 1.1 (Rajpurkar et al., arXiv 1606.05250) and 2.0 (arXiv
1806.03822) define them: lower case, without ASCII punctuation, the articles a, an, the and extra
spaces; the best of the reference answers counts. A question without answer is right, in both
figures, where the prediction is empty, and wrong otherwise.
"""

import argparse
import json
import lzma
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from metro_ext.command_line import run
from metro_ext.errors import UserError

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
    """Question id -> reference answers, of SQuAD 1.1 or 2.0; [""] for a question without answer.

    Answers that are empty after normalisation do not count, as in the official script.
    """
    opener = lzma.open if path.suffix == ".xz" else open
    answers: dict[str, list[str]] = {}
    with opener(path, "rt", encoding="utf-8") as file:
        try:
            articles = json.load(file)["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: expected SQuAD's JSON with 'data' ({error!r})") from None
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                for answer in question["answers"]:
                    start = answer["answer_start"]
                    text = paragraph["context"][start : start + len(answer["text"])]
                    if text != answer["text"]:
                        raise UserError(
                            f"{path}: question {question['id']}: expected the answer "
                            f"{answer['text']!r} at character {start} of its context, "
                            f"found {text!r}"
                        )
                texts = [a["text"] for a in question["answers"] if normalise(a["text"])]
                answers[question["id"]] = texts or [""]
    return answers


def score(answers: dict[str, list[str]], predictions: dict[str, str]) -> dict[str, float]:
    """Per cent of exact matches and mean F1 over all questions; a missing prediction is wrong."""
    totals = {"exact": 0.0, "f1": 0.0}
    for question, texts in answers.items():
        if question in predictions:
            found = predictions[question]
            totals["exact"] += max(exact(text, found) for text in texts)
            totals["f1"] += max(f1(text, found) for text in texts)
    return {name: 100 * total / len(answers) for name, total in totals.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.finetune.squad",
        description="Exact match and F1 of predictions on a SQuAD file.",
    )
    parser.add_argument("data", type=Path, help="dev-v1.1.json or dev-v2.0.json, plain or .xz")
    parser.add_argument("predictions", type=Path, help="JSON: question id -> answer text")
    options = parser.parse_args(argv)
    predictions = json.loads(options.predictions.read_text(encoding="utf-8"))
    print(json.dumps(score(read_answers(options.data), predictions)))


if __name__ == "__main__":
    run(main)
