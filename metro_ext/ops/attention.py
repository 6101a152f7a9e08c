"""Attention over packed sequences, with a learned bias by relative position and dropout."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metro_ext import _C  # noqa: F401  (registers torch.ops.metro)
from metro_ext.errors import UserError
from metro_ext.ops.first_order import first_order


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    max_seqlen: int,
    *,
    seed: Tensor | None = None,
    p: float = 0.0,
    draw: int = 0,
) -> Tensor:
    """Softmax attention within each packed sequence; every token sees its whole sequence.

    score(i, j) = q_i·k_j / √d + bias[head, j − i + L − 1], out_i = Σ_j dropout(softmax_j) v_j, with
    i, j counted inside the sequence and L = max_seqlen. The algorithm is that of FlashAttention-2
    (Dao, arXiv 2307.08691): nothing of size length × length is held, and the backward pass
    recomputes the probabilities and the dropout.

    Args:
        qkv: queries, keys and values [T, 3, heads, d], float32 or bfloat16 (float16 on CUDA); d is
            a multiple of 8 up to 128.
        cu_seqlens: int32 [S + 1], where sequence s holds the tokens cu_seqlens[s] up to
            cu_seqlens[s + 1]; from 0 to T. Repeated values are empty sequences and cost nothing.
        bias: float32 [heads, 2 L − 1], added to the scores, or None. A T5 table of buckets becomes
            it with :func:`relative_bias`.
        max_seqlen: L; no sequence is longer.
        seed: one int64 on the device of ``qkv``, the key of the dropout; may be None when ``p`` is
            0.
        p: share of the probabilities that is dropped, in [0, 1], rounded to a multiple of 2^-16;
            what is kept is scaled by 1 / (1 − p).
        draw: tells apart the dropouts that share a seed (the layer, say), in [0, 2^24).

    Returns:
        [T, heads, d] like ``qkv``.

    All gradients are deterministic; that of ``bias`` is summed over the sequences in float32, on
    CUDA in at most 255 · heads · (2 L − 1) partial sums.

    Raises:
        RuntimeError: an argument is not as above, or a head is too large for the shared memory of a
            CUDA device (float32 beyond 96 columns, backward beyond 64, where a block has 99 KB).
            Sequence boundaries are checked on the CPU only, since reading them on CUDA would wait
            for the device.
    """
    return torch.ops.metro.attention(qkv, cu_seqlens, bias, max_seqlen, seed, p, draw)[0]


def relative_bias(table: Tensor, max_seqlen: int, max_distance: int) -> Tensor:
    """Expands a T5 table of bucket biases to one value per relative position.

    The buckets are those of T5 (Raffel et al., arXiv 1910.10683) for an encoder, as in MPNet: half
    of them for keys before the query and at its place, half for keys after it; in each half the
    first half is one bucket per distance, the rest grow logarithmically up to ``max_distance``.

    Args:
        table: float32 [buckets, heads]; buckets is even and at least 4.
        max_seqlen: L, at least 1.
        max_distance: all distances from here on share the last bucket; above buckets / 4.

    Returns:
        float32 [heads, 2 L − 1] for :func:`attention`: column j − i + L − 1 is for key j and query
        i. Differentiable by ``table``.

    Raises:
        UserError: the shape of ``table`` or a size does not fit.
    """
    if table.dim() != 2 or table.shape[0] < 4 or table.shape[0] % 2 != 0:
        raise UserError(
            "relative_bias: table must have shape [buckets, heads] with an even number of buckets, "
            f"at least 4, found {list(table.shape)}"
        )
    if max_seqlen < 1:
        raise UserError(f"relative_bias: max_seqlen must be at least 1, found {max_seqlen}")
    max_exact = table.shape[0] // 4
    if max_distance <= max_exact:
        raise UserError(
            "relative_bias: max_distance must be more than a quarter of the buckets "
            f"({max_exact}), found {max_distance}"
        )
    relative = torch.arange(1 - max_seqlen, max_seqlen, device=table.device)
    buckets = _relative_position_bucket(relative, table.shape[0], max_distance)
    # Not table[buckets]: far distances share a bucket, and the gradient of indexing would add their
    # hundreds of rows one after the other on CUDA.
    return F.embedding(buckets, table).t().contiguous()


def _relative_position_bucket(relative: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each relative position (key − query), int64 like ``relative``."""
    half = buckets // 2
    max_exact = half // 2
    distance = relative.abs()
    # In float32 and in this order, as in T5: a bucket's edge may hang on the last bit.
    growth = torch.log(distance.clamp_min(1).float() / max_exact) / math.log(
        max_distance / max_exact
    )
    far = max_exact + (growth * (half - max_exact)).long()
    bucket = torch.where(distance < max_exact, distance, far.clamp_max(half - 1))
    return bucket + half * (relative > 0)


@torch.library.register_fake("metro::attention")
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    max_seqlen: int,
    seed: Tensor | None,
    p: float,
    draw: int,
) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(tokens, heads, head_dim)
    return out, qkv.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.register_fake("metro::attention_backward")
def _(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    max_seqlen: int,
    seed: Tensor | None,
    p: float,
    draw: int,
) -> tuple[Tensor, Tensor]:
    grad_bias = qkv.new_empty(0, dtype=torch.float32)
    if bias is not None:
        grad_bias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, cu_seqlens, bias, ctx.max_seqlen, seed, ctx.p, ctx.draw = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for `lse`
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, bias, seed)


@first_order("metro::attention")
def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Any) -> tuple[Tensor | None, ...]:
    qkv, out, lse, cu_seqlens, bias, seed = ctx.saved_tensors
    grad_qkv, grad_bias = torch.ops.metro.attention_backward(
        grad_out, qkv, out, lse, cu_seqlens, bias, ctx.max_seqlen, seed, ctx.p, ctx.draw
    )
    return grad_qkv, None, None if bias is None else grad_bias, None, None, None, None


torch.library.register_autograd("metro::attention", _backward, setup_context=_setup_context)
