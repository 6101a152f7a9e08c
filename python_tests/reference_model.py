"""The encoder in float64, one sequence at a time: what ``metro_ext.model`` must equal."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metro_ext.model import Encoder, Transform


def bucket(relative: int, buckets: int, max_distance: int) -> int:
    """Hugging Face MPNet's ``relative_position_bucket`` for one key - query distance."""
    half = buckets // 2
    offset = half if relative > 0 else 0
    distance = abs(relative)
    exact = half // 2
    if distance < exact:
        return offset + distance
    # In float32, as there: the borders of the logarithmic buckets depend on it.
    ratio = torch.log(torch.tensor(distance).float() / exact) / math.log(max_distance / exact)
    large = exact + int((ratio * (half - exact)).to(torch.long))
    return offset + min(large, half - 1)


def norm(x: Tensor, module, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], module.weight.double(), module.bias.double(), eps)


def transform(x: Tensor, module: Transform, eps: float) -> Tensor:
    dense = F.linear(x, module.dense.weight.double(), module.dense.bias.double())
    return norm(F.gelu(dense), module.norm, eps)


def encode(encoder: Encoder, ids: Tensor) -> Tensor:
    """One sequence of ids [L], without dropout -> [L, H]."""
    config, length = encoder.config, len(ids)
    eps, heads = config.layer_norm_eps, config.heads
    embeddings = encoder.embeddings
    positions = torch.arange(length) + 2
    x = norm(
        embeddings.token.double()[ids] + embeddings.position.double()[positions],
        embeddings.norm,
        eps,
    )
    table = encoder.relative_bias.double()
    index = torch.tensor(
        [
            [
                bucket(j - i, config.relative_buckets, config.relative_max_distance)
                for j in range(length)
            ]
            for i in range(length)
        ]
    )
    bias = table[index].permute(2, 0, 1)
    for layer in encoder.layers:
        qkv = F.linear(x, layer.qkv.weight.double(), layer.qkv.bias.double())
        q, k, v = qkv.view(length, 3, heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        out = layer.attention_out
        x = norm(
            x + F.linear(mixed, out.weight.double(), out.bias.double()), layer.attention_norm, eps
        )
        inner = F.gelu(F.linear(x, layer.ffn_in.weight.double(), layer.ffn_in.bias.double()))
        out = layer.ffn_out
        x = norm(x + F.linear(inner, out.weight.double(), out.bias.double()), layer.ffn_norm, eps)
    return x
