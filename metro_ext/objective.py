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
    HeadGradients,
    VocabHead,
    mask_tokens,
    pretrain_loss,
    replace_tokens,
    row_gradient,
    rtd_head,
)

IGNORED = -100


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives.

    loss: float32 [], the weighted objective.
    metrics: float32 [12], sums and counts in the order of ``metro_ext.ops.METRICS``.
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


class Objective:
    """Runs one objective on a model; holds no state of the run.

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
        mlm_count, _, clm_count = (None,) * 3 if denominators is None else denominators.unbind()
        if model.objective == "mlm":
            table = model.main.table(self.dtype)
            hidden = model.main(masked, packing, table)
            heads = HeadGradients(table.matrix)
            scale = row_gradient(self.config.mlm_weight, target, mlm_count)
            mlm = self._vocabulary(heads, model.main_head, hidden[position], target, scale)
            loss, metrics = self._loss(denominators, mlm=(mlm.nll, mlm.hit, target))
            loss = heads.attach(loss)
            return StepOutput(loss, metrics, masked, position, target, None, None, None)

        table = model.auxiliary.table(self.dtype)
        hidden = model.auxiliary(masked, packing, table)
        tied = [HeadGradients(table.matrix)]
        scale = row_gradient(self.config.mlm_weight, target, mlm_count)
        mlm = self._vocabulary(
            tied[0], model.auxiliary_head, hidden[position], target, scale, packing.seed
        )
        corrupted, label = replace_tokens(tokens, position, target, mlm.sample, pad_id=PAD_ID)
        if model.config.share_embeddings == "none":
            table = model.main.table(self.dtype)
            tied.append(HeadGradients(table.matrix))
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
            scale = row_gradient(self.config.clm_weight, clm_target, clm_count)
            clm = self._vocabulary(tied[-1], model.main_head, rows, clm_target, scale)
            parts["clm"] = (clm.nll, clm.hit, clm_target)
        loss, metrics = self._loss(denominators, **parts)
        for heads in tied:
            loss = heads.attach(loss)
        return StepOutput(loss, metrics, masked, position, target, corrupted, label, logit)

    def _vocabulary(
        self,
        heads: HeadGradients,
        head: LanguageModelHead,
        rows: Tensor,
        target: Tensor,
        scale: Tensor,
        seed: Tensor | None = None,
    ) -> VocabHead:
        """The head on rows [N, H], tied to the token table; samples where there is a seed."""
        return heads.vocab_head(
            head.transform(rows),
            head.bias,
            target,
            scale,
            seed=seed,
            temperature=self.config.sampling_temperature,
        )

    def _loss(self, denominators: Tensor | None, **parts: tuple) -> tuple[Tensor, Tensor]:
        return pretrain_loss(
            **parts,
            denominators=denominators,
            mlm_weight=self.config.mlm_weight,
            rtd_weight=self.config.rtd_weight,
            clm_weight=self.config.clm_weight,
        )
