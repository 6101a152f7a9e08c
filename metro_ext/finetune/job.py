"""What the kinds of tasks share: a job, its results over seeds, and what each kind must do."""

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from metro_ext.finetune.loop import Settings
from metro_ext.pretrained import Pretrained

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Job:
    """What every seed of one fine-tuning shares; ``limit``: examples to train on."""

    pretrained: Pretrained
    data: Path
    settings: Settings
    device: torch.device
    limit: int | None = None

    @property
    def length(self) -> int:
        """The most tokens that the model reads."""
        return self.pretrained.config.model.sequence_length


@dataclass
class Result:
    """One seed's model, its metrics by dev file, and what else it found there."""

    model: Any  # the kind's module; None where it is of no more use
    scores: Scores
    found: Any = None


class Kind(Protocol):
    """A task as the command line runs it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def name(self) -> str: ...

    @property
    def tests_reason(self) -> str:
        """Why there is no submission; empty where there is one."""

    def settings(self, hidden: int) -> Settings:
        """The published hyper-parameters for a model of that width."""

    def finetune(self, job: Job, seed: int) -> Result:
        """Trains and scores one seed; all files are read before training begins."""

    def write(self, job: Job, chosen: Result, out: Path) -> list[Path]:
        """The model of one seed for transformers; returns what else was written."""

    def load_tests(self, data: Path) -> Any:
        """The test files of a submission."""

    def submit(self, job: Job, chosen: Result, tests: Any, out: Path) -> list[Path]:
        """Predictions of the test files in the official format."""


def summary(per_seed: list[Scores]) -> dict[str, dict[str, float]]:
    """``FILE METRIC`` -> median, lowest and highest over the seeds."""
    table = {}
    for name, metrics in per_seed[0].items():
        for metric in metrics:
            values = [scores[name][metric] for scores in per_seed]
            table[f"{name} {metric}"] = {
                "median": statistics.median(values), "min": min(values), "max": max(values),
            }  # fmt: skip
    return table


def median_seed(results: list[Result]) -> Result:
    """The seed in the middle (the lower of two) by the first metric of the first dev file."""
    first = next(iter(results[0].scores))
    metric = next(iter(results[0].scores[first]))
    ranked = sorted(results, key=lambda result: result.scores[first][metric])
    return ranked[(len(ranked) - 1) // 2]
