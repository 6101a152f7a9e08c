"""Cross-entropy over a large vocabulary, and a sample from it, without holding the logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from metro_ext import _C  # noqa: F401  (registers torch.ops.metro)
from metro_ext.ops.first_order import first_order


class VocabHead(NamedTuple):
    """What :func:`vocab_head` gives for N rows. Only ``nll`` is differentiable."""

    nll: Tensor  # float32 [N], -log softmax(logits)[target] in nats; 0 where ignored
    lse: Tensor  # float32 [N], log Σ exp(logits)
    hit: Tensor  # uint8 [N], 1 where the first argmax of the logits is the target
    sample: Tensor  # int64 [N], one token a row; empty without a seed


def vocab_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    seed: Tensor | None = None,
    temperature: float = 1.0,
    draw: int = 0,
) -> VocabHead:
    """Loss, hits and samples of the logits ``hidden @ weight.T + bias``, tile by tile.

    Args:
        hidden: activations [N, H], float32 or bfloat16 (float16 on CUDA).
        weight: [V, H] in the dtype of ``hidden``.
        bias: float32 [V].
        target: int64 [N], ids in [0, V), or -100 for a row that is to be ignored: nll 0, hit 0, no
            gradient (but a sample, if samples are asked for).
        seed: one int64 on the device of the data, the key of the random numbers; None: no samples.
        temperature: samples come from softmax(logits / temperature); > 0.
        draw: tells apart the draws that share a seed, 0 <= draw < 2**24.

    Returns:
        A :class:`VocabHead`. The logits are rounded to the dtype of ``hidden`` before the bias is
        added, as a linear layer's are; everything after that is float32.

    Samples depend on the seed, ``draw``, the row's index and its logits alone; csrc/vocab_head/
    vocab_head.h describes the scheme (Gumbel-max over tiles, inverse CDF inside the winner).
    Neither pass holds an N × V matrix: the backward pass computes the logits again. All results
    are deterministic.

    Raises:
        RuntimeError: a shape, dtype, device, the temperature, or (on the CPU) a target is not as
            above.
    """
    return VocabHead(
        *torch.ops.metro.vocab_head(hidden, weight, bias, target, seed, temperature, draw)
    )


@torch.library.register_fake("metro::vocab_head")
def _(hidden, weight, bias, target, seed, temperature, draw):
    rows = hidden.shape[0]
    nll = hidden.new_empty(rows, dtype=torch.float32)
    hit = hidden.new_empty(rows, dtype=torch.uint8)
    sample = hidden.new_empty(rows if seed is not None else 0, dtype=torch.int64)
    return nll, torch.empty_like(nll), hit, sample


@torch.library.register_fake("metro::vocab_head_backward")
def _(grad_nll, lse, hidden, weight, bias, target):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(hidden, memory_format=contiguous),
        torch.empty_like(weight, memory_format=contiguous),
        torch.empty_like(bias, memory_format=contiguous),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, target, *_ = inputs
    _, lse, hit, sample = output
    ctx.mark_non_differentiable(lse, hit, sample)
    ctx.save_for_backward(lse, hidden, weight, bias, target)


@first_order("metro::vocab_head")
def _backward(ctx, grad_nll, *_):
    grads = torch.ops.metro.vocab_head_backward(grad_nll, *ctx.saved_tensors)
    return *grads, None, None, None, None


torch.library.register_autograd("metro::vocab_head", _backward, setup_context=_setup_context)
