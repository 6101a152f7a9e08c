"""Evaluation of a pretraining model on held-out text, with the same corruption as in training."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from metro_ext.batches import Batch
from metro_ext.model import Packing, PretrainingModel
from metro_ext.objective import FIGURES, IGNORED, RunsObjective


def pack(batch: Batch, device: torch.device) -> tuple[Tensor, Packing]:
    """The tokens [T] of a batch and its packing, on the device."""
    packing = Packing(
        batch.positions.to(device, non_blocking=True),
        batch.cu_seqlens.to(device, non_blocking=True),
        batch.max_seqlen,
        batch.seed.to(device, non_blocking=True),
    )
    return batch.tokens.to(device, non_blocking=True), packing


@torch.no_grad()
def evaluate(
    model: PretrainingModel,
    objective: RunsObjective,
    batches: Iterable[Batch],
    device: torch.device,
    unigram_nats: np.ndarray,
) -> dict[str, float | None]:
    """Figures of the model on batches; the model's mode is kept.

    Args:
        objective: an `Objective`, or what runs one.
        unigram_nats: float64 [V], -ln of each token's frequency in the training text: the model
            that knows nothing but frequencies, scored on the same masked tokens.

    Returns:
        ``mlm_loss`` (nats a masked token, auxiliary model; main model for ``mlm``),
        ``mlm_perplexity``, ``unigram_loss``, ``unigram_perplexity``, ``rtd_auc``, ``rtd_f1`` (of
        "replaced"), and what `interval_figures` gives; None for what the objective does not have.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(FIGURES), dtype=torch.float64)
    logits, labels, unigram_loss = [], [], 0.0
    for batch in batches:
        tokens, packing = pack(batch, device)
        out = objective(model, tokens, packing)
        sums += out.metrics.double().cpu()
        target = out.target.cpu().numpy()
        unigram_loss += float(unigram_nats[target[target != IGNORED]].sum())
        if out.rtd_logit is not None and out.label is not None:
            kept = (out.label <= 1).cpu()
            logits.append(out.rtd_logit.cpu()[kept].numpy())
            labels.append(out.label.cpu()[kept].numpy())
    model.train(was_training)
    figures = interval_figures(sums, model.auxiliary is not None)
    m = dict(zip(FIGURES, sums.tolist(), strict=True))
    figures["mlm_perplexity"] = _exp(figures["mlm_loss"])
    figures["unigram_loss"] = _ratio(unigram_loss, m["mlm_count"])
    figures["unigram_perplexity"] = _exp(figures["unigram_loss"])
    figures["rtd_auc"] = roc_auc(np.concatenate(logits), np.concatenate(labels)) if logits else None
    predicted_or_true = m["rtd_predicted_replaced"] + m["replaced_count"]
    figures["rtd_f1"] = _ratio(2 * m["rtd_true_positive"], predicted_or_true) if logits else None
    return figures


def interval_figures(sums: Tensor, has_samples: bool) -> dict[str, float | None]:
    """Means from the summed figures of any number of micro-batches; None where absent.

    Args:
        sums: in the order of ``metro_ext.objective.FIGURES``.
        has_samples: whether the objective draws any.

    Returns:
        ``mlm_loss`` and ``mlm_accuracy``; ``replaced_share`` (of the masked positions, samples that
        differ from the original), ``sample_accuracy`` (those that do not), ``sample_nats`` (mean
        -ln p(sample) of the auxiliary model at temperature 1: its entropy, where the samples too
        are drawn at 1); ``rtd_loss``, ``rtd_accuracy``, ``rtd_majority`` (accuracy of always saying
        "original"); ``clm_loss`` and ``clm_accuracy``.
    """
    m = dict(zip(FIGURES, sums.tolist(), strict=True))
    originals = m["rtd_count"] - m["replaced_count"]
    samples = m["mlm_count"] if has_samples else 0
    return {
        "mlm_loss": _ratio(m["mlm_nll_sum"], m["mlm_count"]),
        "mlm_accuracy": _ratio(m["mlm_hits"], m["mlm_count"]),
        "rtd_loss": _ratio(m["rtd_loss_sum"], m["rtd_count"]),
        "rtd_accuracy": _ratio(m["rtd_hits"], m["rtd_count"]),
        "rtd_majority": _ratio(originals, m["rtd_count"]),
        "replaced_share": _ratio(m["samples_replaced"], samples),
        "sample_accuracy": _ratio(samples - m["samples_replaced"], samples),
        "sample_nats": _ratio(m["sample_nats_sum"], samples),
        "clm_loss": _ratio(m["clm_nll_sum"], m["clm_count"]),
        "clm_accuracy": _ratio(m["clm_hits"], m["clm_count"]),
    }


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the ROC curve: the chance that a positive (label 1) outscores a negative.

    Ties count half (the Mann-Whitney U statistic over all pairs). None with one class only.
    """
    positive = int((labels == 1).sum())
    negative = labels.size - positive
    if positive == 0 or negative == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    mean_rank = last_rank - (counts - 1) / 2
    rank_sum = mean_rank[inverse][labels == 1].sum()
    return float((rank_sum - positive * (positive + 1) / 2) / (positive * negative))


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _exp(nats: float | None) -> float | None:
    return None if nats is None else math.exp(min(nats, 700.0))
