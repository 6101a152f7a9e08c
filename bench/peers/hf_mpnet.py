"""The whole METRO step from Hugging Face MPNet modules, the one encoder there with T5 buckets.

Two ``MPNetModel``s that share the token table, ``MPNetLMHead``s tied to it on the masked rows
alone, the same corruption, losses, clipping and fused AdamW as ours. Every choice goes the peer's
way: no padding and so no mask, positions given and not computed, ``index_select`` for the masked
rows, the cheapest way of sampling, no metrics.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MPNetConfig, MPNetModel
from transformers.models.mpnet.modeling_mpnet import MPNetLMHead

from bench.peers.sampling import SAMPLING
from metro_ext.config_schema import ModelConfig, ObjectiveConfig, OptimConfig
from metro_ext.model import FIRST_POSITION
from metro_ext.objective import mask_count
from metro_ext.optim import decays

# bfloat16 by autocast, or by bfloat16 weights beside float32 masters that the optimizer updates.
MIXED = ("autocast", "masters")


def mpnet_config(config: ModelConfig, layers: int, dropout: float) -> MPNetConfig:
    """MPNet's configuration of one of the two encoders."""
    if (config.relative_buckets, config.relative_max_distance) != (32, 128):
        raise ValueError(
            "MPNet computes 32 buckets up to a distance of 128, whatever is configured"
        )
    return MPNetConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        num_hidden_layers=layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=config.sequence_length + FIRST_POSITION,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.init_std,
    )


class ReplacedTokenHead(nn.Module):
    """dense, GELU, LayerNorm, one logit that starts at zero."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.logit = nn.Linear(config.hidden, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.logit(self.norm(F.gelu(self.dense(x)))).squeeze(-1)


class MetroFromMPNet(nn.Module):
    """Forward pass and loss: MLM (auxiliary) + 50 RTD + CLM (main, masked positions).

    Args:
        special_ids: int64 0, 1, ...; never masked, never drawn as random tokens.
        mask_id: id of ``[MASK]``.
        sampling: how the auxiliary model's tokens are drawn, a key of `SAMPLING`.
    """

    def __init__(
        self,
        config: ModelConfig,
        objective: ObjectiveConfig,
        special_ids: Tensor,
        mask_id: int,
        sampling: str,
    ):
        super().__init__()
        self.config, self.objective = config, objective
        self.mask_id, self.sample = mask_id, SAMPLING[sampling]
        self.register_buffer("special_ids", special_ids, persistent=False)
        self.main = self._encoder(config, config.layers, config.dropout)
        self.auxiliary = self._encoder(config, config.aux_layers, config.aux_dropout)
        self.auxiliary.set_input_embeddings(self.main.get_input_embeddings())
        self.auxiliary_head, self.main_head = self._head(), self._head()
        self.rtd_head = ReplacedTokenHead(config)

    @staticmethod
    def _encoder(config: ModelConfig, layers: int, dropout: float) -> MPNetModel:
        encoder = MPNetModel(mpnet_config(config, layers, dropout), add_pooling_layer=False)
        encoder.embeddings.dropout.p = 0.0  # ours has none there
        return encoder

    def _head(self) -> MPNetLMHead:
        head = MPNetLMHead(self.main.config)
        head.decoder.weight = self.main.get_input_embeddings().weight
        head.decoder.bias = head.bias
        return head

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [S, L] -> float32 loss []."""
        shape, flat = tokens.shape, tokens.flatten()
        masked, position, target = self._mask(flat)
        rows = self._encode(self.auxiliary, masked.view(shape)).index_select(0, position)
        logits = self.auxiliary_head(rows).float()
        mlm = F.cross_entropy(logits, target)
        corrupted = flat.scatter(0, position, self.sample(logits.detach()))
        label = (corrupted != flat).float()
        hidden = self._encode(self.main, corrupted.view(shape))
        rtd = F.binary_cross_entropy_with_logits(self.rtd_head(hidden).float(), label)
        clm_logits = self.main_head(hidden.index_select(0, position)).float()
        clm = F.cross_entropy(clm_logits, target)
        weights = self.objective
        return weights.mlm_weight * mlm + weights.rtd_weight * rtd + weights.clm_weight * clm

    def _mask(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masked tokens [T], positions [N] and what stood there [N]."""
        count = mask_count(flat.numel(), self.objective.mask_fraction)
        score = torch.rand(flat.shape, device=flat.device)
        score = score.masked_fill(torch.isin(flat, self.special_ids), -1.0)
        position = score.topk(count).indices
        target = flat.index_select(0, position)
        kind = torch.rand(count, device=flat.device)
        ordinary = torch.randint(
            len(self.special_ids), self.config.vocab_size, (count,), device=flat.device
        )
        shown = self.objective.mask_token_fraction
        random = shown + self.objective.random_token_fraction
        shown_as = torch.where(
            kind < shown, self.mask_id, torch.where(kind < random, ordinary, target)
        )
        return flat.scatter(0, position, shown_as), position, target

    @staticmethod
    def _encode(encoder: MPNetModel, tokens: Tensor) -> Tensor:
        """tokens [S, L] -> hidden states [S · L, H]."""
        first, length = FIRST_POSITION, tokens.shape[1]
        positions = torch.arange(first, first + length, device=tokens.device).expand(tokens.shape)
        return encoder(tokens, position_ids=positions).last_hidden_state.flatten(0, 1)


class HuggingFaceStep:
    """One optimizer step a call: zero the gradients, forward, backward, clip, AdamW.

    Args:
        mixed: "" for float32, or one of `MIXED`.
        compiled: the whole forward pass goes through ``torch.compile`` with fixed shapes.
        batches: int64 [S, L] each, taken in turns.
    """

    def __init__(
        self,
        model: MetroFromMPNet,
        optim: OptimConfig,
        batches: list[Tensor],
        *,
        mixed: str,
        compiled: bool,
    ):
        device = batches[0].device
        self.model = model.to(device).train()
        self.clip_norm, self.mixed, self.device = optim.clip_norm, mixed, device
        self.masters: list[Tensor] = []
        groups = [
            {
                "params": [p for n, p in self.model.named_parameters() if decays(n, p) == decay],
                "weight_decay": optim.weight_decay if decay else 0.0,
            }
            for decay in (True, False)
        ]
        if mixed == "masters":
            groups = self._with_masters(groups)
        self.updated = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        self.forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
        self.batches = itertools.cycle(batches)

    def _with_masters(self, groups: list[dict]) -> list[dict]:
        """Float32 copies for the optimizer; the model itself becomes bfloat16."""
        self.weights = [p for group in groups for p in group["params"]]
        groups = [
            {**group, "params": [p.detach().clone().requires_grad_() for p in group["params"]]}
            for group in groups
        ]
        self.masters = [p for group in groups for p in group["params"]]
        self.model.to(torch.bfloat16)
        return groups

    def __call__(self) -> Tensor:
        """The loss [], detached."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed == "autocast"):
            loss = self.forward(next(self.batches))
        loss.backward()
        for master, weight in zip(self.masters, self.weights if self.masters else (), strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.updated, self.clip_norm)
        self.optimizer.step()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()
