"""Every operator in plain PyTorch, meant for float64: the one source of truth for the tests."""

import math

import numpy as np
import torch
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def philox4x32(seed: int, c0, c1, c2, c3) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011) with the 64-bit key ``seed``.

    The counter words are integers or arrays that broadcast. Returns the words as uint64 [..., 4].
    """
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.broadcast_arrays(
        *(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3))
    )
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            p1 >> np.uint64(32) ^ c1 ^ np.uint64(k0),
            p1 & low,
            p0 >> np.uint64(32) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def half_words(words: np.ndarray) -> np.ndarray:
    """The eight 16-bit numbers of each Philox call: uint64 [..., 4] -> uint64 [..., 8]."""
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    return halves.reshape(*words.shape[:-1], 8)


def attention_keep(
    seed: int, p: float, draw: int, start: int, length: int, heads: int
) -> tuple[Tensor, float]:
    """The dropout of a sequence at packed position ``start``.

    Returns the probabilities that are kept, bool [heads, query, key], and the scale of those.
    """
    threshold = int(p * 65536 + 0.5)
    key_groups = np.arange((length + 7) // 8)[None, None, :]
    tokens = start + np.arange(length)[None, :, None]
    words = philox4x32(seed, key_groups, tokens, 2 << 24 | draw, np.arange(heads)[:, None, None])
    numbers = half_words(words).reshape(heads, length, 8 * key_groups.size)[:, :, :length]
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return torch.from_numpy(numbers >= threshold), scale


def attention(
    qkv: Tensor,
    bias: Tensor | None,
    lengths: list[int],
    max_seqlen: int,
    seed: int = 0,
    p: float = 0.0,
    draw: int = 0,
) -> tuple[Tensor, Tensor]:
    """out [T, heads, d] and the log-sum-exp of the scores [heads, T]."""
    outs, lses, start = [], [], 0
    for length in lengths:
        q, k, v = qkv[start : start + length].unbind(1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(qkv.shape[-1])
        if bias is not None:
            position = torch.arange(length)
            scores = scores + bias[:, position[None, :] - position[:, None] + max_seqlen - 1]
        probs = scores.softmax(-1)
        if p > 0:
            keep, scale = attention_keep(seed, p, draw, start, length, qkv.shape[2])
            probs = probs * keep * scale
        outs.append(torch.einsum("hij,jhd->ihd", probs, v))
        lses.append(scores.logsumexp(-1))
        start += length
    return torch.cat(outs), torch.cat(lses, dim=1)
