"""The sizes of METRO, and what a model of a given shape holds and costs.

Sizes and settings from `base` on are the published ones of METRO-T0 and its group (batch
2048 x 512 tokens, Adam, linear decay, clipping for the ++ sizes); what is not published is said
beside its value. `tiny` and `small` are for one machine and an afternoon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metro_ext.config_schema import ModelConfig, ObjectiveConfig
from metro_ext.errors import UserError

Settings = dict[str, dict[str, Any]]

_UNCASED_32K = {"vocab_size": 32_000, "cased": False}
_CASED_128K = {"vocab_size": 128_000, "cased": True}


def _published(
    shape: dict[str, Any], data: dict[str, Any], lr: float, steps: int, clip_norm: float
) -> Settings:
    """A size of the paper with its pretraining settings.

    32 micro-batches of 64 sequences make the batch of 2048, on any number of ranks that divides 32.
    """
    return {
        "model": {"sequence_length": 512, "relative_bias_init": "zero", **shape},
        "optim": {"lr": lr, "warmup_steps": 10_000, "weight_decay": 0.01, "clip_norm": clip_norm},
        "data": data,
        "run": {
            "steps": steps,
            "tokens_per_batch": 64 * 512,
            "accumulation": 32,
            "precision": "bf16",
            "eval_interval": 5000,
            "checkpoint_interval": 5000,
        },
    }


def _shape(layers: int, hidden: int, heads: int, aux_layers: int, **rest: Any) -> dict[str, Any]:
    sizes = {"layers": layers, "hidden": hidden, "ffn": 4 * hidden, "heads": heads}
    return {**sizes, "aux_layers": aux_layers, **rest}


_BASE = _shape(12, 768, 12, aux_layers=4)
_LARGE = _shape(24, 1024, 16, aux_layers=6)
# Published: 1.6 B and 5.4 B parameters. 48 x 1536 and 64 x 2560 layers are the shapes that fit;
# the learning rate, taken over from large++, is not published for them.
_XL = _shape(48, 1536, 24, aux_layers=8, depth_scaled_init=True)
_XXL = _shape(64, 2560, 40, aux_layers=8, depth_scaled_init=True)

PRESETS: dict[str, Settings] = {
    # The default run: sized for two CPU cores.
    "tiny": {
        "model": _shape(2, 128, 2, 2, sequence_length=128, relative_bias_init="local"),
        "optim": {"lr": 1e-3, "warmup_steps": 100, "weight_decay": 0.01, "clip_norm": 2.0},
        "data": {"vocab_size": 1024, "cased": False},
        "run": {"steps": 1500, "tokens_per_batch": 2048, "accumulation": 1, "precision": "fp32"},
    },
    # ELECTRA-Small's shape, batch, rate and length, at full embedding width.
    "small": {
        "model": _shape(12, 256, 4, 4, sequence_length=128, relative_bias_init="local"),
        "optim": {"lr": 5e-4, "warmup_steps": 10_000, "weight_decay": 0.01, "clip_norm": 2.0},
        "data": _UNCASED_32K,
        "run": {
            "steps": 1_000_000,
            "tokens_per_batch": 128 * 128,
            "accumulation": 1,
            "precision": "bf16",
            "eval_interval": 5000,
            "checkpoint_interval": 5000,
        },
    },
    "base": _published(_BASE, _UNCASED_32K, lr=4e-4, steps=125_000, clip_norm=0.0),
    "base++": _published(_BASE, _CASED_128K, lr=2e-4, steps=2_000_000, clip_norm=2.0),
    # Large for base's length: no published setting of its own; large++'s rate.
    "large": _published(_LARGE, _CASED_128K, lr=1e-4, steps=125_000, clip_norm=2.0),
    "large++": _published(_LARGE, _CASED_128K, lr=1e-4, steps=2_000_000, clip_norm=2.0),
    "xl": _published(_XL, _CASED_128K, lr=1e-4, steps=2_000_000, clip_norm=2.0),
    "xxl": _published(_XXL, _CASED_128K, lr=1e-4, steps=2_000_000, clip_norm=2.0),
}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part; tables that both encoders share are counted once."""

    embeddings: int  # token and position tables and their LayerNorms, of both encoders
    aux: int  # auxiliary encoder without embeddings and head; 0 where the objective has none
    main: int  # main encoder without embeddings and heads
    heads: int
    main_model: int  # main encoder with its embeddings, no head: what is exported and published

    @property
    def total(self) -> int:
        return self.embeddings + self.aux + self.main + self.heads


def _vocabulary(model: ModelConfig) -> int:
    if model.vocab_size < 1:
        raise UserError("model.vocab_size must be known to size the model, found 0 (tokenizer's)")
    return model.vocab_size


def parameter_count(model: ModelConfig, objective: ObjectiveConfig) -> ParameterCount:
    """Exact number of trained parameters.

    Before every head stands a dense H x H with bias and a LayerNorm. A vocabulary head projects
    with the token table of its own encoder and adds a bias [V]; the RTD head ends in one logit.
    The objectives differ in what they train: `mlm` the main encoder alone, with a vocabulary head;
    the others both encoders, the auxiliary one with a vocabulary head, the main one with an RTD
    head (`metro`, `electra`) and a vocabulary head (`metro`, `clm-all`).
    """
    hidden, vocab = model.hidden, _vocabulary(model)
    norm = 2 * hidden
    attention = 3 * hidden * hidden + 3 * hidden + hidden * hidden + hidden
    feed_forward = 2 * hidden * model.ffn + model.ffn + hidden
    layer = attention + feed_forward + 2 * norm
    bias_table = model.relative_buckets * model.heads
    main = model.layers * layer + bias_table

    token = vocab * hidden
    position = (model.sequence_length + 2) * hidden  # positions begin at 2, as in MPNet
    one_embedding = token + position + norm

    body = hidden * hidden + hidden + norm
    vocab_head = body + vocab
    rtd_head = body + hidden + 1

    if objective.name == "mlm":
        return ParameterCount(one_embedding, 0, main, vocab_head, one_embedding + main)
    shared = {"none": 0, "token": token, "all": one_embedding}[model.share_embeddings]
    main_heads = {"metro": rtd_head + vocab_head, "electra": rtd_head, "clm-all": vocab_head}
    return ParameterCount(
        embeddings=2 * one_embedding - shared,
        aux=model.aux_layers * layer + bias_table,
        main=main,
        heads=vocab_head + main_heads[objective.name],
        main_model=one_embedding + main,
    )


def flops_per_token(
    model: ModelConfig, objective: ObjectiveConfig, sequence_length: int | None = None
) -> float:
    """Floating point operations of forward and backward, per token of a packed batch.

    Counts what is useful work in matrix products: linear layers, attention (scores and weighted
    values, over sequences of `sequence_length` tokens; by default the longest), vocabulary heads
    on the masked rows alone (all rows for the main model's head in `clm-all`). A multiply-add is
    two operations; backward is twice the forward. Recomputation does not count.
    """
    hidden, vocab = model.hidden, _vocabulary(model)
    length = model.sequence_length if sequence_length is None else sequence_length
    linear = 2 * (4 * hidden * hidden + 2 * hidden * model.ffn)
    attention = 2 * 2 * length * hidden
    dense = 2 * hidden * hidden
    vocab_head = dense + 2 * hidden * vocab
    rtd_head = dense + 2 * hidden
    masked = objective.mask_fraction
    if objective.name == "mlm":
        return 3.0 * (model.layers * (linear + attention) + masked * vocab_head)
    main_heads = {
        "metro": rtd_head + masked * vocab_head,
        "electra": rtd_head,
        "clm-all": vocab_head,
    }
    layers = model.layers + model.aux_layers
    heads = masked * vocab_head + main_heads[objective.name]
    return 3.0 * (layers * (linear + attention) + heads)
