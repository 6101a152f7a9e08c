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
    TokenTable,
    VocabHead,
    mask_tokens,
    pretrain_loss,
    replace_tokens,
    rtd_head,
    vocab_head,
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
        table = model.main.table(self.dtype)
        if model.objective == "mlm":
            hidden = model.main(masked, packing, table)
            mlm = self._vocabulary(table, model.main_head, hidden[position], target)
            loss, metrics = self._loss(denominators, mlm=(mlm.nll, mlm.hit, target))
            return StepOutput(loss, metrics, masked, position, target, None, None, None)

        sample, mlm_part = self._auxiliary(
            model, table, masked, position, target, packing, early_backward
        )
        parts, early = {"mlm": mlm_part}, None
        if early_backward:
            early = self._loss(denominators, **parts)
            early[0].backward()
            parts.clear()
        corrupted, label = replace_tokens(tokens, position, target, sample, pad_id=PAD_ID)
        hidden = model.main(corrupted, packing, table)
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
            clm = self._vocabulary(table, model.main_head, rows, clm_target)
            parts["clm"] = (clm.nll, clm.hit, clm_target)
        loss, metrics = self._loss(denominators, **parts)
        if early is not None:
            loss, metrics = loss + early[0].detach(), metrics + early[1]
        return StepOutput(loss, metrics, masked, position, target, corrupted, label, logit)

    def _auxiliary(
        self,
        model: PretrainingModel,
        table: TokenTable,
        masked: Tensor,
        position: Tensor,
        target: Tensor,
        packing: Packing,
        early_backward: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The samples int64 [N], and the auxiliary model's part of the loss."""
        if model.config.share_embeddings == "none":
            table = model.auxiliary.table(self.dtype)
        elif early_backward:
            table = table.apart()
        hidden = model.auxiliary(masked, packing, table)
        mlm = self._vocabulary(table, model.auxiliary_head, hidden[position], target, packing.seed)
        return mlm.sample, (mlm.nll, mlm.hit, target)

    def _vocabulary(
        self,
        table: TokenTable,
        head: LanguageModelHead,
        rows: Tensor,
        target: Tensor,
        seed: Tensor | None = None,
    ) -> VocabHead:
        """The head on rows [N, H], tied to the token table; samples where there is a seed."""
        return vocab_head(
            head.transform(rows),
            table.matrix,
            head.bias,
            target,
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
