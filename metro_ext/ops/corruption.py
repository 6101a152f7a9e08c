"""What the models read: the auxiliary one masked tokens, the main one samples in their place."""

import torch
from torch import Tensor

from metro_ext import _C  # noqa: F401  (registers torch.ops.metro)

IGNORED_TARGET = -100


def mask_tokens(
    tokens: Tensor,
    special: Tensor,
    seed: Tensor,
    *,
    count: int,
    mask_id: int,
    vocab_size: int,
    mask_fraction: float = 0.8,
    random_fraction: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a fixed number of positions and masks them (BERT, arXiv 1810.04805, section 3.1).

    The positions are uniform over the subsets of ``count`` tokens that are not special. A token
    there becomes ``mask_id`` with probability ``mask_fraction``, an ordinary id (uniform over
    [0, vocab_size) without the special ones) with probability ``random_fraction``, and else stays
    what it is.

    Args:
        tokens: int64 [T], ids in [0, vocab_size).
        special: int64 [K], ascending and distinct: the ids that are neither masked nor drawn (the
            padding, the sentence marks, ``mask_id``).
        seed: one int64 on the device of ``tokens``. The result depends on (tokens, seed) alone.
        count: positions to draw; fixed, so that shapes do not depend on the data.
        mask_id: id of the mask token.
        vocab_size: number of ids, below 2^31.
        mask_fraction, random_fraction: probabilities whose sum does not exceed 1.

    Returns:
        masked: int64 [T].
        position: int64 [count], ascending. If fewer than ``count`` tokens can be masked, the slots
            left over at the end hold 0.
        target: int64 [count], the original tokens at ``position``; -100 in the slots left over.

    Raises:
        RuntimeError: a shape, dtype, device or (on the CPU) id is not as above.
    """
    return torch.ops.metro.mask_tokens(
        tokens, special, seed, count, mask_id, vocab_size, mask_fraction, random_fraction
    )


def replace_tokens(
    tokens: Tensor, position: Tensor, target: Tensor, sample: Tensor, *, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Puts the auxiliary model's samples in and labels every token (ELECTRA, arXiv 2003.10555).

    Args:
        tokens: int64 [T], the original tokens (not the masked ones).
        position: int64 [N], distinct; as from :func:`mask_tokens`.
        target: int64 [N], the tokens at ``position``; slots with -100 are skipped.
        sample: int64 [N], what to put at ``position``.
        pad_id: id of the padding.

    Returns:
        corrupted: int64 [T].
        label: uint8 [T]: 255 at padding, 1 where a sample differs from the original, 0 elsewhere,
            also where a sample happens to be the original.

    Raises:
        RuntimeError: a shape, dtype or device is not as above; on the CPU also if a position is out
            of range or ``target`` is not what ``tokens`` hold there.
    """
    return torch.ops.metro.replace_tokens(tokens, position, target, sample, pad_id)


@torch.library.register_fake("metro::mask_tokens")
def _(
    tokens: Tensor,
    special: Tensor,
    seed: Tensor,
    count: int,
    mask_id: int,
    vocab_size: int,
    mask_fraction: float,
    random_fraction: float,
) -> tuple[Tensor, Tensor, Tensor]:
    masked = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    return masked, tokens.new_empty(count), tokens.new_empty(count)


@torch.library.register_fake("metro::replace_tokens")
def _(
    tokens: Tensor, position: Tensor, target: Tensor, sample: Tensor, pad_id: int
) -> tuple[Tensor, Tensor]:
    corrupted = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    return corrupted, torch.empty_like(corrupted, dtype=torch.uint8)
