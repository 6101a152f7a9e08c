"""The main encoder as a checkpoint of Hugging Face's MPNet, which is the same network, and back.

Written and read without transformers: safetensors, ``config.json`` and the tokenizer's files. What
stock MPNet fixes is checked here: 32 buckets up to a distance of 128, whatever its configuration
says. Other bucket settings are written for the classes that ``metro_ext.hf`` registers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from metro_ext.atomic import atomic_write
from metro_ext.config_schema import ModelConfig
from metro_ext.errors import UserError
from metro_ext.model import FIRST_POSITION, Encoder, LanguageModelHead
from metro_ext.records import field
from metro_ext.tokenizer import BOS_ID, EOS_ID, PAD_ID, Tokenizer
from metro_ext.tokenizer_json import write_tokenizer_files

STOCK_BUCKETS = (32, 128)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
CUSTOM_TYPE = "metro_mpnet"  # what metro_ext.hf registers

# Ours -> MPNet's, inside one layer; the query, key and value rows of ours are one matrix.
_LAYER = {
    "attention_out": "attention.attn.o",
    "attention_norm": "attention.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "token": "embeddings.word_embeddings.weight",
    "position": "embeddings.position_embeddings.weight",
    "norm.weight": "embeddings.LayerNorm.weight",
    "norm.bias": "embeddings.LayerNorm.bias",
}
_BIAS = "encoder.relative_attention_bias.weight"


def is_stock(config: ModelConfig) -> bool:
    """Whether MPNet's own classes compute the model's buckets."""
    return (config.relative_buckets, config.relative_max_distance) == STOCK_BUCKETS


def architecture(config: ModelConfig, head: str) -> str:
    """The class that computes the model's buckets: MPNet's own, or that of `metro_ext.hf`."""
    return f"{'MPNet' if is_stock(config) else 'MetroMPNet'}{head}"


def encoder_tensors(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's parameters under MPNet's names (without the prefix ``mpnet.``), float32."""
    ours = dict(encoder.named_parameters())
    theirs = {name: ours[f"embeddings.{key}"] for key, name in _EMBEDDINGS.items()}
    theirs[_BIAS] = encoder.relative_bias
    for index, layer in enumerate(encoder.layers):
        prefix = f"encoder.layer.{index}."
        for kind in ("weight", "bias"):
            for part, rows in zip("qkv", getattr(layer.qkv, kind).chunk(3), strict=True):
                theirs[f"{prefix}attention.attn.{part}.{kind}"] = rows
            for key, name in _LAYER.items():
                theirs[f"{prefix}{name}.{kind}"] = getattr(getattr(layer, key), kind)
    return {name: value.detach().float().cpu() for name, value in theirs.items()}


@torch.no_grad()
def load_encoder(encoder: Encoder, theirs: Mapping[str, Tensor], source: Path) -> None:
    """The inverse of `encoder_tensors`; UserError names a missing tensor or one of another shape.

    ``position_ids`` and the pooler, which the encoder does not have, are passed over.
    """
    expected = encoder_tensors(encoder)
    for name, value in expected.items():
        if name not in theirs:
            raise UserError(f"{source}: expected the tensor {name}, found none of that name")
        if theirs[name].shape != value.shape:
            raise UserError(
                f"{source}: {name} must have shape {list(value.shape)}, "
                f"found {list(theirs[name].shape)}: the checkpoint is of another size"
            )
    ours = dict(encoder.named_parameters())
    for key, name in _EMBEDDINGS.items():
        ours[f"embeddings.{key}"].copy_(theirs[name])
    encoder.relative_bias.copy_(theirs[_BIAS])
    for index, layer in enumerate(encoder.layers):
        prefix = f"encoder.layer.{index}."
        for kind in ("weight", "bias"):
            rows = [theirs[f"{prefix}attention.attn.{part}.{kind}"] for part in "qkv"]
            getattr(layer.qkv, kind).copy_(torch.cat(rows))
            for key, name in _LAYER.items():
                getattr(getattr(layer, key), kind).copy_(theirs[f"{prefix}{name}.{kind}"])


def language_model_tensors(head: LanguageModelHead) -> dict[str, Tensor]:
    """The head under the names of ``MPNetForMaskedLM``; the projection is tied there too."""
    transform = head.transform
    return {
        "lm_head.dense.weight": transform.dense.weight,
        "lm_head.dense.bias": transform.dense.bias,
        "lm_head.layer_norm.weight": transform.norm.weight,
        "lm_head.layer_norm.bias": transform.norm.bias,
        "lm_head.bias": head.bias,
    }


def pooler_tensors(hidden: int) -> dict[str, Tensor]:
    """A pooler that passes the first token's state through tanh: pretraining has none."""
    return {"pooler.dense.weight": torch.eye(hidden), "pooler.dense.bias": torch.zeros(hidden)}


def mpnet_config(config: ModelConfig, layers: int, architecture: str, **rest: Any) -> dict:
    """``config.json`` of an encoder with ``layers`` layers.

    Raises:
        UserError: a stock architecture for bucket settings that MPNet does not compute.
    """
    stock = architecture.startswith("MPNet")
    if stock and not is_stock(config):
        raise UserError(
            "MPNet computes 32 relative buckets up to a distance of 128, whatever is configured; "
            f"found {config.relative_buckets} up to {config.relative_max_distance}: export with "
            "--classes metro, and load after `import metro_ext.hf`"
        )
    document = {
        "architectures": [architecture],
        "model_type": "mpnet" if stock else CUSTOM_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.sequence_length + FIRST_POSITION,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.layer_norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "bos_token_id": BOS_ID,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    if not stock:
        document["relative_attention_max_distance"] = config.relative_max_distance
    return document | rest


def shape_of(document: dict, source: Path) -> dict[str, Any]:
    """The fields of `ModelConfig` that a ``config.json`` tells, the inverse of `mpnet_config`."""
    keys = {
        "layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size",
        "heads": "num_attention_heads", "vocab_size": "vocab_size",
        "relative_buckets": "relative_attention_num_buckets",
    }  # fmt: skip
    shape = {ours: field(f"{source}", document, theirs, int) for ours, theirs in keys.items()}
    length = field(f"{source}", document, "max_position_embeddings", int) - FIRST_POSITION
    return shape | {
        "sequence_length": length,
        "relative_max_distance": document.get("relative_attention_max_distance", STOCK_BUCKETS[1]),
        "layer_norm_eps": field(f"{source}", document, "layer_norm_eps", float, int),
    }


def check_tokenizer(tokenizer: Tokenizer, document: dict, source: Path) -> None:
    """UserError unless the tokenizer has as many entries as the ``config.json`` says."""
    if tokenizer.vocab_size != document.get("vocab_size"):
        raise UserError(
            f"{source}: the checkpoint's vocabulary has {document.get('vocab_size')} entries, "
            f"the tokenizer {tokenizer.vocab_size}: it is another tokenizer"
        )


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: dict, tokenizer: Tokenizer
) -> None:
    """Weights, configuration and tokenizer files; each file appears only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer_files(tokenizer, folder, config["max_position_embeddings"] - FIRST_POSITION)
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_write(folder / WEIGHTS) as file:
        file.write(save(whole, metadata={"format": "pt"}))
    with atomic_write(folder / CONFIG, "w") as file:
        file.write(json.dumps(config, indent=2) + "\n")


def write_encoder(
    folder: Path, encoder: Encoder, tokenizer: Tokenizer, name: str | None = None
) -> None:
    """An encoder without a head; ``name`` of its class, by default that of `architecture`."""
    config = encoder.config
    document = mpnet_config(config, config.layers, name or architecture(config, "Model"))
    tensors = encoder_tensors(encoder) | pooler_tensors(config.hidden)
    write_checkpoint(folder, tensors, document, tokenizer)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors without the prefix ``mpnet.``, and the configuration, of an MPNet checkpoint."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: expected {name} of an MPNet checkpoint, found none")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG}: expected a model's configuration ({error})") from None
    if kind not in ("mpnet", CUSTOM_TYPE):
        raise UserError(f"{folder / CONFIG}: expected model_type mpnet, found {kind!r}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {error}") from None
    return {name.removeprefix("mpnet."): value for name, value in tensors.items()}, config
