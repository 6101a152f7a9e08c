"""The CUDA kernels of mask_tokens and replace_tokens, emulated: the CPU's results bit for bit."""

import pytest
import torch
from emulation import emulated

from metro_ext.ops import mask_tokens, replace_tokens

VOCAB, MASK = 50, 7
SPECIAL = torch.tensor([0, 1, 2, MASK, 48, 49])


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    "length, count", [(1, 1), (40, 39), (333, 50), (2500, 375), (9003, 1350), (0, 3)]
)
def test_same_as_cpu(length, count, order):
    tokens = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length))
    seed = torch.tensor([-5])
    kernels = emulated("corruption")
    got = kernels.run(
        "mask_tokens", tokens=tokens, special=SPECIAL, seed=seed, masked=tokens,
        position=torch.empty(count, dtype=torch.int64),
        target=torch.empty(count, dtype=torch.int64),
        scratch_order=torch.empty(length, dtype=torch.int32),
        maskable=torch.empty(length, dtype=torch.uint8), length=length,
        special_count=len(SPECIAL), count=count, mask_id=MASK, ordinary=VOCAB - len(SPECIAL),
        mask_threshold=round(0.8 * 2**32), random_threshold=round(0.9 * 2**32), order=order,
        written=("masked", "position", "target", "scratch_order", "maskable"),
    )  # fmt: skip
    expected = mask_tokens(tokens, SPECIAL, seed, count=count, mask_id=MASK, vocab_size=VOCAB)
    for name, value in zip(("masked", "position", "target"), expected, strict=True):
        assert torch.equal(got[name], value), name
    _, position, target = expected
    sample = target.flip(0).clamp_min(0)
    got = kernels.run(
        "replace_tokens", tokens=tokens, position=position, target=target, sample=sample,
        corrupted=tokens, label=torch.empty(length, dtype=torch.uint8), length=length, count=count,
        pad_id=1, order=order, written=("corrupted", "label"),
    )  # fmt: skip
    corrupted, label = replace_tokens(tokens, position, target, sample, pad_id=1)
    assert torch.equal(got["corrupted"], corrupted)
    assert torch.equal(got["label"], label)
