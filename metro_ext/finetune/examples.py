"""What every loader of a classification task gives."""

from collections.abc import Hashable
from dataclasses import dataclass

Row = list[int]  # token ids of one sequence, with <s> and </s>


@dataclass(frozen=True)
class Example:
    """One text or pair of texts.

    label: index into the task's labels, a score for regression, None in a test set.
    group: examples of one group are one question (several choices or answers).
    index: what a submission file calls it.
    """

    text: str
    pair: str | None
    label: int | float | None
    index: Hashable
    group: Hashable = None
