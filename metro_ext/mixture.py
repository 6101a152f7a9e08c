"""Several corpora as one training text, each with its share of the windows.

A training text is written as a list of paths, of which each may carry a weight: `web=0.7,books=0.3`
(`data.train`). Which corpus a window comes from is a function of the window's number alone, and the
shares are exact: of any first n windows a corpus has its share, but for less than one window for
each corpus before it.
"""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from metro_ext.corpus_format import Manifest
from metro_ext.errors import UserError


class Corpus(Protocol):
    """What a mixture asks of `metro_ext.corpus.Corpus`."""

    folder: Path
    manifest: Manifest

    def __len__(self) -> int: ...
    def unigram_counts(self) -> np.ndarray: ...


C = TypeVar("C", bound=Corpus)


@dataclass(frozen=True, eq=False)
class Mixture(Generic[C]):
    """Corpora of one tokenizer and their weights.

    Attributes:
        corpora: at least one.
        weights: whole numbers without a common divisor; a corpus's share is its weight over their
            sum, `total`.
    """

    corpora: tuple[C, ...]
    weights: tuple[int, ...]

    @classmethod
    def of(cls, corpora: Sequence[C], weights: Sequence[Fraction] | None = None) -> "Mixture[C]":
        """Corpora with weights of any scale; by default each weighs its tokens.

        Raises:
            UserError: a weight is negative, all are zero, or the corpora have several tokenizers.
        """
        if weights is None:
            weights = [Fraction(len(corpus)) for corpus in corpora]
        for corpus, weight in zip(corpora, weights, strict=True):
            if weight < 0:
                raise UserError(f"{corpus.folder}: expected a weight of at least 0, found {weight}")
            expected, found = (c.manifest.tokenizer_sha256 for c in (corpora[0], corpus))
            if found != expected:
                raise UserError(
                    f"{corpus.folder}: made with another tokenizer than {corpora[0].folder} "
                    f"(expected sha256 {expected}, found {found}): build it again with that one"
                )
        if not any(weights):
            raise UserError("the weights of the corpora are all 0: give one of them a share")
        scale = math.lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        divisor = math.gcd(*whole)
        return cls(tuple(corpora), tuple(weight // divisor for weight in whole))

    @property
    def total(self) -> int:
        return sum(self.weights)

    @property
    def shares(self) -> list[float]:
        return [weight / self.total for weight in self.weights]

    def __len__(self) -> int:
        """Tokens of all corpora together."""
        return sum(map(len, self.corpora))

    def place(self, number: int) -> tuple[int, int]:
        """Which corpus has the window of that number, and how many it has had before.

        The first corpus takes floor(n * share) of the first n windows, evenly spread; what is left
        is numbered anew and shared by the others in the same way.
        """
        rest = self.total
        for index, weight in enumerate(self.weights[:-1]):
            before = number * weight // rest
            if (number + 1) * weight // rest > before:
                return index, before
            number -= before
            rest -= weight
        return len(self.weights) - 1, number

    def unigram_counts(self) -> np.ndarray:
        """How often each id is to be met in `len(self)` tokens of the mixture: float64 [V]."""
        if len(self.corpora) == 1:
            return self.corpora[0].unigram_counts().astype(np.float64)
        parts = zip(self.corpora, self.shares, strict=True)
        counts = (share / len(c) * c.unigram_counts() for c, share in parts)
        return len(self) * functools.reduce(np.add, counts)

    def describe(self) -> list[str]:
        """A line for each corpus: its share, its tokens, and what the mixture takes it through."""
        return [
            f"{share:.2%} {corpus.folder}: {len(corpus):,} tokens, "
            f"{share * 1e9 / len(corpus):.3g} epochs in 10^9 tokens"
            for corpus, share in zip(self.corpora, self.shares, strict=True)
        ]


def split_weight(entry: str) -> tuple[str, Fraction | None]:
    """An entry `PATH=WEIGHT`, or `PATH`, as path and weight.

    Raises:
        UserError: what follows the last "=" is not a number, and the entry is no path.
    """
    path, equals, text = entry.rpartition("=")
    if not equals or os.path.exists(entry):
        return entry, None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not path or not math.isfinite(weight):
        raise UserError(f"expected PATH or PATH=WEIGHT, found {entry!r}")
    return path, Fraction(repr(weight))  # 0.7 as 7/10
