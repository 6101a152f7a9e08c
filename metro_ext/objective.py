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

from dataclasses import dataclass

import torch
from torch import Tensor

from metro_ext.config_schema import ObjectiveConfig
from metro_ext.model import PAD_ID, LanguageModelHead, Packing, PretrainingModel
from metro_ext.ops import (
    METRICS,
    TokenTable,
    VocabHead,
    mask_tokens,
    pretrain_loss,
    replace_tokens,
    rtd_head,
    vocab_head,
)

IGNORED = -100
# What a micro-batch is summed up to: the sums and counts of the operator, and of the samples.
FIGURES = (
    *METRICS,
    "sample_nats_sum",  # -ln p(sample) at temperature 1, over the masked positions that count
    "samples_replaced",  # samples that differ from the original
)
STAGES = 50  # of a schedule of constants; the least that a CUDA graph has to be captured anew


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
    ) -> StepOutput:
        """One micro-batch of int64 tokens [T].

        ``denominators`` (float32 [3]: MLM, RTD and CLM counts) replace this batch's own counts
        where a step has several micro-batches or ranks.
        """
        count = mask_count(tokens.numel(), self.config.mask_fraction)
        masked, position, target = mask_tokens(
            tokens,
            self.special_ids,
            packing.seed,
            count=count,
            vocab_size=model.config.vocab_size,
            mask_id=self.mask_id,
            mask_fraction=self.config.mask_token_fraction,
            random_fraction=self.config.random_token_fraction,
        )
        if model.objective == "mlm":
            table = model.main.table(self.dtype)
            hidden = model.main(masked, packing, table)
            rows = model.main_head.transform(hidden[position])
            mlm = self._vocabulary(table, model.main_head, rows, target)
            loss, metrics = self._loss(denominators, mlm=(mlm.nll, mlm.hit, target))
            metrics = torch.cat([metrics, metrics.new_zeros(len(FIGURES) - len(METRICS))])
            return StepOutput(loss, metrics, masked, position, target, None, None, None)

        table = model.auxiliary.table(self.dtype)
        hidden = model.auxiliary(masked, packing, table)
        rows = model.auxiliary_head.transform(hidden[position])
        mlm = self._vocabulary(table, model.auxiliary_head, rows, target, packing.seed)
        nats = _sample_nats(rows, table, model.auxiliary_head, mlm, target)
        corrupted, label = replace_tokens(tokens, position, target, mlm.sample, pad_id=PAD_ID)
        if model.config.share_embeddings == "none":
            table = model.main.table(self.dtype)
        hidden = model.main(corrupted, packing, table)
        parts = {"mlm": (mlm.nll, mlm.hit, target)}
        logit = None
        if model.rtd_head is not None:
            head = model.rtd_head
            rtd_loss, logit, _ = rtd_head(head.transform(hidden), head.weight, head.bias, label)
            parts["rtd"] = (rtd_loss, logit, label)
        if model.main_head is not None:
            if model.objective == "clm-all":
                rows, clm_target = hidden, tokens.masked_fill(tokens == PAD_ID, IGNORED)
            else:
                rows, clm_target = hidden[position], target
            rows = model.main_head.transform(rows)
            clm = self._vocabulary(table, model.main_head, rows, clm_target)
            parts["clm"] = (clm.nll, clm.hit, clm_target)
        loss, metrics = self._loss(denominators, **parts)
        metrics = torch.cat([metrics, torch.stack([nats, (label == 1).sum().float()])])
        return StepOutput(loss, metrics, masked, position, target, corrupted, label, logit)

    def _vocabulary(
        self,
        table: TokenTable,
        head: LanguageModelHead,
        rows: Tensor,
        target: Tensor,
        seed: Tensor | None = None,
    ) -> VocabHead:
        """The projection of rows [N, H] by the token table; samples where there is a seed."""
        return vocab_head(
            rows,
            table.matrix,
            head.bias,
            target,
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
    logit = torch.einsum("nh,nh->n", rows.detach().float(), matrix[out.sample].float())
    nats = out.lse - logit - head.bias.detach()[out.sample]
    return torch.where(target == IGNORED, 0.0, nats).sum()
