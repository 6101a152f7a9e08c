"""Every operator in plain PyTorch, meant for float64: the one source of truth for the tests."""

import math

import numpy as np
import torch
from philox_reference import (
    ATTENTION_DROPOUT,
    counter_word,
    half_words,
    mask_words,
    philox4x32,
)
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def attention_keep(
    seed: int, p: float, draw: int, start: int, length: int, heads: int
) -> tuple[Tensor, float]:
    """The dropout of a sequence at packed position ``start``.

    Returns the probabilities that are kept, bool [heads, query, key], and the scale of those.
    """
    threshold = int(p * 65536 + 0.5)
    key_groups = np.arange((length + 7) // 8)[None, None, :]
    tokens = start + np.arange(length)[None, :, None]
    word = counter_word(ATTENTION_DROPOUT, draw)
    words = philox4x32(seed, key_groups, tokens, word, np.arange(heads)[:, None, None])
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


def layer_norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_factor: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``dropout_factor``: what dropout multiplies each element by (0, or 1 / share kept)."""
    z = x if bias is None else x + bias
    if dropout_factor is not None:
        z = z * dropout_factor
    if residual is not None:
        z = z + residual
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + shift


def rtd_head(hidden: Tensor, weight: Tensor, bias: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    """Loss, logit, hits."""
    logit = hidden @ weight + bias
    counted = label != 255
    loss = torch.nn.functional.softplus(torch.where(label == 1, -logit, logit), threshold=1e9)
    hits = ((logit > 0) == (label == 1))[counted].sum()
    return torch.where(counted, loss, 0.0), logit, hits


def mask_tokens(
    tokens: Tensor,
    special: Tensor,
    seed: int,
    count: int,
    mask_id: int,
    vocab_size: int,
    mask_fraction: float,
    random_fraction: float,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, special_ids = tokens.tolist(), set(special.tolist())
    words = mask_words(seed, len(ids)).tolist()
    maskable = [t for t, token in enumerate(ids) if token not in special_ids]
    position = sorted(sorted(maskable, key=lambda t: (words[t][0], t))[:count])
    ordinary = [token for token in range(vocab_size) if token not in special_ids]
    masked = list(ids)
    for t in position:
        _, kind, choice, _ = words[t]
        if kind < round(mask_fraction * 2**32):
            masked[t] = mask_id
        elif kind < round((mask_fraction + random_fraction) * 2**32):
            masked[t] = ordinary[choice * len(ordinary) >> 32]
    left = count - len(position)
    target = [ids[t] for t in position] + [-100] * left
    return torch.tensor(masked), torch.tensor(position + [0] * left), torch.tensor(target)


def replace_tokens(
    tokens: Tensor, position: Tensor, target: Tensor, sample: Tensor, pad_id: int
) -> tuple[Tensor, Tensor]:
    corrupted = tokens.clone()
    used = target != -100
    corrupted[position[used]] = sample[used]
    label = (corrupted != tokens).to(torch.uint8)
    label[tokens == pad_id] = 255
    return corrupted, label


def vocab_logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return hidden @ weight.T + bias


def vocab_head(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The negative log-likelihood of each row; 0 where the target is -100."""
    logits = vocab_logits(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=-100)


def pretrain_loss(
    mlm: tuple | None,
    rtd: tuple | None,
    clm: tuple | None,
    denominators: Tensor | None,
    weights: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """The parts as in ``metro_ext.ops.pretrain_loss``."""

    def tokens(part):
        nll, hit, target = part
        counted = target != -100
        return [nll[counted].sum(), hit[counted].sum(), counted.sum()]

    def detection(part):
        loss, logit, label = part
        counted, replaced, predicted = label != 255, label == 1, logit > 0
        counts = [(replaced == predicted), counted, predicted, replaced & predicted]
        return [replaced.sum(), loss[counted].sum(), *((c & counted).sum() for c in counts)]

    zero = torch.zeros((), dtype=torch.float64)
    figures = [
        *(tokens(mlm) if mlm else [zero] * 3),
        *(detection(rtd) if rtd else [zero] * 6),
        *(tokens(clm) if clm else [zero] * 3),
    ]
    metrics = torch.stack([f.double() for f in figures])
    if denominators is None:
        denominators = metrics[[2, 6, 11]].detach()
    loss = zero
    for weight, total, denominator in zip(weights, metrics[[0, 4, 9]], denominators, strict=True):
        if denominator != 0:
            loss = loss + weight * total / denominator
    return loss, metrics.detach()
