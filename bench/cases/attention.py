"""Attention on packed sequences with a learned relative bias."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.common import Contender, OpCase, compiled, random, seeded
from bench.timing import Work
from metro_ext.ops import attention

# sequences, tokens in each, heads, head size
SHAPES = {
    # The last two are those of the whole steps that bench/step.py measures.
    "cpu": ((8, 512, 12, 64), (32, 128, 4, 64), (4, 512, 12, 64)),
    "cuda": ((64, 512, 12, 64), (256, 128, 12, 64)),
}
SMALL_SHAPES = ((2, 32, 2, 32),)
DROPOUT = 0.1


def cases(device: str, small: bool) -> list[OpCase]:
    shapes = SMALL_SHAPES if small else SHAPES[device]
    return [_case(device, shape, p) for shape in shapes for p in (0.0, DROPOUT)]


def _case(device: str, shape: tuple[int, int, int, int], p: float) -> OpCase:
    count, length, heads, size = shape
    tokens = count * length
    matrix = 4.0 * tokens * length * heads * size  # scores and weighted values
    element = tokens * heads * size

    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        generator = seeded()
        tensors = {
            "qkv": random(generator, tokens, 3, heads, size, device=device, dtype=dtype),
            "bias": random(generator, heads, 2 * length - 1, device=device),
            "cu_seqlens": torch.arange(count + 1, dtype=torch.int32, device=device) * length,
        }
        return tensors | ({"seed": torch.tensor(1, device=device)} if p else {})

    contenders = {
        "ours": Contender(lambda: partial(attention, max_seqlen=length, p=p)),
        "eager": Contender(lambda: _eager(count, length, p), as_activations=True),
        "compiled": Contender(compiled(_eager(count, length, p)), as_activations=True),
        "sdpa bias": Contender(lambda: _sdpa(count, length, p, True), as_activations=True),
        "sdpa no bias": Contender(
            lambda: _sdpa(count, length, p, False), lesser="the bias", as_activations=True
        ),
        "flex attention": Contender(
            lambda: _flex(count, length),
            absent=_flex_absent(device, p),
            as_activations=True,
        ),
    }
    if device == "cuda":  # what the bias costs
        contenders["ours no bias"] = Contender(lambda: _without_bias(length, p), lesser="the bias")
    dropout = f" dropout {p}" if p else ""
    return OpCase(
        family="attention",
        name=f"attention {count}x{length}x{heads}x{size}{dropout}",
        inputs=inputs,
        activations="qkv",
        gradients=("qkv", "bias"),
        contenders=contenders,
        # q, k, v in, out; then those four and its gradient in, three gradients out.
        forward=lambda itemsize: Work(4 * element * itemsize, matrix),
        backward=lambda itemsize: Work(8 * element * itemsize, 2 * matrix),
        recomputed=matrix / 2,  # the scores
    )


def _without_bias(length: int, p: float):
    def function(
        qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        return attention(qkv, cu_seqlens, None, length, seed=seed, p=p)

    return function


def _heads_first(qkv: Tensor, count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T, 3, heads, d] -> three views [S, heads, L, d]."""
    packed = qkv.view(count, length, *qkv.shape[1:])
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def _packed(out: Tensor) -> Tensor:
    """[S, heads, L, d] -> [T, heads, d], as the product that follows reads it."""
    return out.transpose(1, 2).flatten(0, 1)


def _bias_matrix(bias: Tensor, length: int) -> Tensor:
    """[heads, 2 L - 1] -> [heads, L, L], differentiably."""
    place = torch.arange(length, device=bias.device)
    return bias[:, place[None, :] - place[:, None] + length - 1]


def _eager(count: int, length: int, p: float):
    def function(qkv: Tensor, bias: Tensor, **_: Tensor) -> Tensor:
        q, k, v = _heads_first(qkv, count, length)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + _bias_matrix(bias, length)
        return _packed(F.dropout(scores.softmax(-1), p) @ v)

    return function


def _sdpa(count: int, length: int, p: float, with_bias: bool):
    def function(qkv: Tensor, bias: Tensor, **_: Tensor) -> Tensor:
        q, k, v = _heads_first(qkv, count, length)
        mask = _bias_matrix(bias, length)[None] if with_bias else None
        return _packed(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p))

    return function


def _flex_absent(device: str, p: float) -> str:
    if device != "cuda":
        return "with a gradient it runs on CUDA only"
    return "has no dropout" if p else ""


def _flex(count: int, length: int):
    from torch.nn.attention.flex_attention import flex_attention

    def function(qkv: Tensor, bias: Tensor, **_: Tensor) -> Tensor:
        def score(value, batch, head, i, j):
            return value + bias[head, j - i + length - 1]

        q, k, v = _heads_first(qkv, count, length)
        return _packed(flex_attention(q, k, v, score_mod=score))

    return torch.compile(function, dynamic=False)
