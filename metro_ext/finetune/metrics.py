"""The official metrics of GLUE and SuperGLUE, by scikit-learn and scipy (extra ``finetune``)."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from metro_ext.errors import UserError

try:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
except ImportError as error:
    raise UserError(
        f"fine-tuning needs scikit-learn and scipy: pip install 'metro-ext[finetune]' ({error})"
    ) from None


def accuracy(truth: Sequence[int], found: Sequence[int]) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(truth, found))}


def accuracy_and_f1(truth: Sequence[int], found: Sequence[int]) -> dict[str, float]:
    """Accuracy and the F1 of label 1 (MRPC, QQP)."""
    return accuracy(truth, found) | {"f1": float(f1_score(truth, found, zero_division=0))}


def accuracy_and_macro_f1(truth: Sequence[int], found: Sequence[int]) -> dict[str, float]:
    """Accuracy and the unweighted mean of the labels' F1 (CB)."""
    f1 = f1_score(truth, found, average="macro", zero_division=0)
    return accuracy(truth, found) | {"macro_f1": float(f1)}


def matthews(truth: Sequence[int], found: Sequence[int]) -> dict[str, float]:
    """Matthews' correlation; 0 where one label alone is found (CoLA)."""
    return {"mcc": float(matthews_corrcoef(truth, found))} | accuracy(truth, found)


def correlations(truth: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where the predictions do not vary (STS-B)."""
    if np.ptp(found) == 0 or np.ptp(truth) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(truth, found)[0]),
        "spearman": float(spearmanr(truth, found)[0]),
    }


def f1a_and_em(
    groups: Sequence[Hashable], truth: Sequence[int], found: Sequence[int]
) -> dict[str, float]:
    """F1 over all answers, and the share of questions with every answer right (MultiRC)."""
    right: dict[Hashable, bool] = defaultdict(lambda: True)
    for group, t, f in zip(groups, truth, found, strict=True):
        right[group] &= t == f
    f1 = f1_score(truth, found, zero_division=0)
    return {"f1a": float(f1), "em": float(np.mean(list(right.values())))}
