import numpy as np
import pytest

from metro_ext.held_out import roc_auc


def brute_force_auc(scores, labels):
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean(pairs))


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs_with_ties(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, 60)
    scores = generator.integers(0, 9, 60) + labels  # few values: many ties
    assert roc_auc(scores, labels) == pytest.approx(brute_force_auc(scores, labels), abs=1e-12)


def test_auc_of_extremes():
    labels = np.array([0, 0, 1, 1])
    assert roc_auc(np.array([1.0, 2, 3, 4]), labels) == 1.0
    assert roc_auc(np.array([4.0, 3, 2, 1]), labels) == 0.0
    assert roc_auc(np.zeros(4), labels) == 0.5
    assert roc_auc(np.zeros(2), np.ones(2)) is None
