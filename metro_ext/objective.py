"""The objectives: corrupt a batch, run the networks, weigh the losses.

METRO (arXiv 2204.06644): loss = MLM + 50 · RTD + CLM. The auxiliary model fills the masked
positions by sampling; the main model reads the result and learns at every token whether it was
replaced (RTD) and at the masked positions what stood there (CLM). No gradient flows through the
samples. A sample equal to the original counts as original.

    metro     MLM (auxiliary) + 50 RTD + CLM (main, masked positions)
    electra   MLM (auxiliary) + 50 RTD
    clm-all   MLM (auxiliary) + CLM at every token
    mlm       MLM of the main model alone: BERT
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metro_ext.config_schema import ObjectiveConfig
from metro_ext.model import PAD_ID, LanguageModelHead, Packing, PretrainingModel
from metro_ext.ops import (
    METRICS,
    HeadGradients,
    TokenTable,
    VocabHead,
    mask_tokens,
    pretrain_loss,
    replace_tokens,
    row_gradient,
    rtd_head,
)

IGNORED = -100
# What a micro-batch is summed up to: the sums and counts of the operator, and of the samples.
FIGURES = (
    *METRICS,
    "sample_nats_sum",  # -ln p(sample) at temperature 1, over the masked positions that count
    "samples_replaced",  # samples that differ from the original
)
STAGES = 50  # of a schedule of constants; the least that a CUDA graph has to be captured anew


class Masked(NamedTuple):
    """Masked tokens int64 [T], masked positions int64 [N] and what stood there int64 [N]."""

    tokens: Tensor
    position: Tensor
    target: Tensor


class _Auxiliary(NamedTuple):
    """What the auxiliary model gives.

    sample, nats: int64 [N]; float32 [], see `_sample_nats`.
    parts: its part of the loss, unless it went backward early.
    others: the gradients of heads that do not share the main model's table.
    early: loss [] and metrics of a part that went backward early.
    """

    sample: Tensor
    nats: Tensor
    parts: dict[str, tuple[Tensor, Tensor, Tensor]]
    others: list[HeadGradients]
    early: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives.

    loss: float32 [], the weighted objective.
    metrics: float32 [FIGURES], sums and counts in that order; without gradient.
    masked, position, target: the masked tokens [T], masked positions [N] and what stood there [N].
    corrupted, label: what the main model read [T], 1 where replaced (None for ``mlm``).
    rtd_logit: float32 [T], log-odds of "replaced" (None without RTD).
    """

    loss: Tensor
    metrics: Tensor
    masked: Tensor
    position: Tensor
    target: Tensor
    corrupted: Tensor | None
    label: Tensor | None
    rtd_logit: Tensor | None


def mask_count(tokens: int, fraction: float) -> int:
    """Positions masked in a batch of ``tokens``: fixed, so that shapes are static."""
    return max(1, round(tokens * fraction))


def scheduled(start: float, end: float, step: int, steps: int) -> float:
    """From ``start`` to ``end`` over ``steps`` steps, linear but for ``STAGES`` equal stages."""
    stage = min(step, steps) * STAGES // steps
    return start + (end - start) * stage / STAGES


# An `Objective`, or one that is compiled: (model, tokens, packing, denominators[, early_backward]).
RunsObjective = Callable[..., StepOutput]


class Objective:
    """Runs one objective on a model.

    temperature, mlm_weight: of the samples and of the auxiliary loss, as ``set_step`` left them.

    Args:
        config: weights, corruption and sampling.
        special_ids: int64, never masked and never drawn as random tokens.
        mask_id: id of ``[MASK]``.
        dtype: of matrix products and activations.
    """

    def __init__(
        self, config: ObjectiveConfig, special_ids: Tensor, mask_id: int, dtype: torch.dtype
    ):
        self.config, self.special_ids = config, special_ids
        self.mask_id, self.dtype = mask_id, dtype
        self.temperature, self.mlm_weight = config.sampling_temperature, config.mlm_weight

    def set_step(self, step: int, total_steps: int) -> None:
        """Sets what follows a schedule to its value in optimizer step ``step`` (from 1)."""
        config = self.config
        steps = config.schedule_steps or total_steps
        if config.sampling_temperature_end > 0:
            self.temperature = scheduled(
                config.sampling_temperature, config.sampling_temperature_end, step, steps
            )
        if config.mlm_weight_end >= 0:
            self.mlm_weight = scheduled(config.mlm_weight, config.mlm_weight_end, step, steps)

    @property
    def constants(self) -> tuple[float, float]:
        """What a step reads on the host: (temperature, MLM weight)."""
        return self.temperature, self.mlm_weight

    def __call__(
        self,
        model: PretrainingModel,
        tokens: Tensor,
        packing: Packing,
        denominators: Tensor | None = None,
        early_backward: bool = False,
    ) -> StepOutput:
        """One micro-batch of int64 tokens [T].

        Args:
            denominators: float32 [3], MLM, RTD and CLM counts, in the place of this batch's own
                where a step has several micro-batches or ranks.
            early_backward: the auxiliary model goes backward before the main one runs, into the
                ``grad`` of its parameters. Nothing flows from one to the other, so the gradients
                are the same, and the activations of the two are never held together. ``loss`` is
                still the whole loss; its ``backward`` is for the rest.
        """
        count = mask_count(tokens.numel(), self.config.mask_fraction)
        masked = Masked(
            *mask_tokens(
                tokens,
                self.special_ids,
                packing.seed,
                count=count,
                vocab_size=model.config.vocab_size,
                mask_id=self.mask_id,
                mask_fraction=self.config.mask_token_fraction,
                random_fraction=self.config.random_token_fraction,
            )
        )
        table = model.main.table(self.dtype)
        tied = HeadGradients(table.matrix, table.gradient)
        if model.objective == "mlm":
            hidden = model.main(masked.tokens, packing, table)
            assert model.main_head is not None  # the one head of this objective
            rows = model.main_head.transform(hidden[masked.position])
            weight = self.mlm_weight
            mlm = self._vocabulary(
                tied, model.main_head, rows, masked.target, weight, denominators, 0
            )
            loss, metrics = self._loss(denominators, mlm=(mlm.nll, mlm.hit, masked.target))
            metrics = torch.cat([metrics, metrics.new_zeros(len(FIGURES) - len(METRICS))])
            return StepOutput(tied.attach(loss), metrics, *masked, None, None, None)

        auxiliary = self._auxiliary(
            model, table, tied, masked, packing, denominators, early_backward
        )
        corrupted, label = replace_tokens(
            tokens, masked.position, masked.target, auxiliary.sample, pad_id=PAD_ID
        )
        hidden = model.main(corrupted, packing, table)
        parts = auxiliary.parts
        logit = None
        if model.rtd_head is not None:
            head = model.rtd_head
            rtd_loss, logit, _ = rtd_head(head.transform(hidden), head.weight, head.bias, label)
            parts["rtd"] = (rtd_loss, logit, label)
        if model.main_head is not None:
            if model.objective == "clm-all":
                rows, target = hidden, tokens.masked_fill(tokens == PAD_ID, IGNORED)
            else:
                rows, target = hidden[masked.position], masked.target
            rows = model.main_head.transform(rows)
            weight = self.config.clm_weight
            clm = self._vocabulary(tied, model.main_head, rows, target, weight, denominators, 2)
            parts["clm"] = (clm.nll, clm.hit, target)
        loss, metrics = self._loss(denominators, **parts)
        for heads in (tied, *auxiliary.others):
            loss = heads.attach(loss)
        if auxiliary.early is not None:
            loss, metrics = loss + auxiliary.early[0].detach(), metrics + auxiliary.early[1]
        metrics = torch.cat([metrics, torch.stack([auxiliary.nats, (label == 1).sum().float()])])
        return StepOutput(loss, metrics, *masked, corrupted, label, logit)

    def _auxiliary(
        self,
        model: PretrainingModel,
        table: TokenTable,
        tied: HeadGradients,
        masked: Masked,
        packing: Packing,
        denominators: Tensor | None,
        early_backward: bool,
    ) -> _Auxiliary:
        """The auxiliary model's samples and loss; its own backward pass, if it is to be early."""
        others: list[HeadGradients] = []
        assert model.auxiliary is not None and model.auxiliary_head is not None
        if model.config.share_embeddings == "none":
            table = model.auxiliary.table(self.dtype)
            tied = HeadGradients(table.matrix, table.gradient)
            others.append(tied)
        elif early_backward:
            table = table.apart()
        head, target = model.auxiliary_head, masked.target
        hidden = model.auxiliary(masked.tokens, packing, table)
        rows = head.transform(hidden[masked.position])
        mlm = self._vocabulary(
            tied, head, rows, target, self.mlm_weight, denominators, 0, packing.seed
        )
        nats = _sample_nats(rows, table, head, mlm, target)
        parts = {"mlm": (mlm.nll, mlm.hit, target)}
        if not early_backward:
            return _Auxiliary(mlm.sample, nats, parts, others, None)
        early = self._loss(denominators, **parts)
        # The gradient of a table that both models share waits for the main model's part of it.
        tied.attach(early[0], with_matrix=bool(others)).backward()
        return _Auxiliary(mlm.sample, nats, {}, [], early)

    def _vocabulary(
        self,
        tied: HeadGradients,
        head: LanguageModelHead,
        rows: Tensor,
        target: Tensor,
        weight: float,
        denominators: Tensor | None,
        part: int,
        seed: Tensor | None = None,
    ) -> VocabHead:
        """The projection of rows [N, H] by the token table; samples where there is a seed.

        weight, part: of its loss in the objective, and where its count is in the denominators.
        """
        count = None if denominators is None else denominators[part]
        return tied.vocab_head(
            rows,
            head.bias,
            target,
            row_gradient(weight, target, count),
            seed=seed,
            temperature=self.temperature,
        )

    def _loss(self, denominators: Tensor | None, **parts: tuple) -> tuple[Tensor, Tensor]:
        return pretrain_loss(
            **parts,
            denominators=denominators,
            mlm_weight=self.mlm_weight,
            rtd_weight=self.config.rtd_weight,
            clm_weight=self.config.clm_weight,
        )


@torch.no_grad()
def _sample_nats(
    rows: Tensor, table: TokenTable, head: LanguageModelHead, out: VocabHead, target: Tensor
) -> Tensor:
    """float32 []: Σ -ln p(sample), p the softmax at temperature 1, over the rows that count.

    Its mean estimates the entropy of the auxiliary model without bias where the samples, too, are
    drawn at temperature 1, and costs one row of the table a sample.
    """
    matrix = table.matrix.detach()
    logit = (rows.detach().float() * matrix[out.sample].float()).sum(-1)
    nats = out.lse - logit - head.bias.detach()[out.sample]
    return torch.where(target == IGNORED, 0.0, nats).sum()
