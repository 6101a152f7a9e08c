import pytest
import reference
import torch
from op_checks import DEVICES, assert_bitwise_repeatable

from metro_ext.ops import mask_tokens, replace_tokens

VOCAB, MASK = 50, 7
SPECIAL = torch.tensor([0, 1, 2, MASK, 48, 49])
OPTIONS = {"mask_id": MASK, "vocab_size": VOCAB}


def make_tokens(length, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (length,), generator=generator).to(device)


def run(tokens, seed, count, special=SPECIAL, **options):
    seed = torch.tensor([seed], device=tokens.device)
    return mask_tokens(tokens, special.to(tokens.device), seed, count=count, **OPTIONS | options)


def assert_chi_square(counts, expected):
    """Accepts all but one in 10^5 samples that follow the distribution (seeds are fixed)."""
    freedom = len(counts) - 1
    chi_square = float(((counts.double() - expected) ** 2 / expected).sum())
    # Wilson & Hilferty: (χ²/k)^(1/3) is nearly normal.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 4.3, (chi_square, freedom)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fractions", [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.7, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize(
    "length, count, seed",
    [(1, 1, 0), (40, 6, 5), (333, 50, -1), (4096, 614, 2**63 - 1), (9003, 1350, 7)],
)
def test_mask_matches_reference(device, length, count, seed, fractions):
    tokens = make_tokens(length, device)
    options = dict(zip(("mask_fraction", "random_fraction"), fractions, strict=True))
    expected = reference.mask_tokens(tokens.cpu(), SPECIAL, seed, count, MASK, VOCAB, *fractions)
    for a, b in zip(run(tokens, seed, count, **options), expected, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("device", DEVICES)
def test_mask_keeps_its_promises(device):
    tokens = make_tokens(5000, device)
    masked, position, target = run(tokens, 3, 600)
    assert len(position) == 600 and (position.diff() > 0).all()
    assert torch.equal(target, tokens[position])
    assert not torch.isin(target, SPECIAL.to(device)).any()
    untouched = torch.ones(5000, dtype=torch.bool, device=device)
    untouched[position] = False
    assert torch.equal(masked[untouched], tokens[untouched])
    put_in = masked[position]
    drawn = put_in[(put_in != MASK) & (put_in != target)]
    assert not torch.isin(drawn, SPECIAL.to(device)).any()


@pytest.mark.parametrize("device", DEVICES)
def test_fewer_maskable_than_asked_for(device):
    tokens = torch.tensor([0, 5, 1, 9, 2, 10], device=device)
    masked, position, target = run(tokens, 1, 5, mask_fraction=1.0, random_fraction=0.0)
    assert masked.tolist() == [0, MASK, 1, MASK, 2, MASK]
    assert position.tolist() == [1, 3, 5, 0, 0]
    assert target.tolist() == [5, 9, 10, -100, -100]
    masked, position, target = run(SPECIAL.to(device), 1, 2)
    assert torch.equal(masked.cpu(), SPECIAL)
    assert position.tolist() == [0, 0] and target.tolist() == [-100, -100]


@pytest.mark.parametrize("device", DEVICES)
def test_positions_are_uniform(device):
    tokens = torch.full((64,), 5, device=device)
    counts = torch.zeros(64, dtype=torch.int64)
    pairs = torch.zeros(8, 8, dtype=torch.int64)
    for seed in range(4000):
        position = run(tokens, seed, 10)[1].cpu()
        counts[position] += 1
        pairs[position[0] // 8, position[-1] // 8] += 1
    # Without replacement the counts vary less than independent ones: (64 - 10) / 63 of χ².
    assert_chi_square(counts, 4000 * 10 / 64)
    assert float(((counts - 625) ** 2 / 625).sum()) > 64 * 0.3  # nor suspiciously even
    # Smallest and largest position of the exact distribution: C(l - f - 1, 8) / C(64, 10).
    f, last = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    gap = (last - f - 1).double()
    ways = torch.stack([(gap - i).clamp_min(0) / (i + 1) for i in range(8)]).prod(0)
    ways = ways.reshape(8, 8, 8, 8).sum((1, 3))
    expected = 4000 * ways / ways.sum()
    likely = expected > 5
    assert_chi_square(pairs[likely], expected[likely])


@pytest.mark.parametrize("device", DEVICES)
def test_kinds_and_random_ids(device):
    length = 200_000
    tokens = torch.full((length,), 5, device=device)
    masked = run(tokens, 11, length)[0]
    drawn = masked[(masked != MASK) & (masked != 5)]
    counts = torch.tensor([(masked == MASK).sum(), (masked == 5).sum(), len(drawn)])
    ordinary = VOCAB - len(SPECIAL)
    share = torch.tensor([0.8, 0.1 + 0.1 / ordinary, 0.1 - 0.1 / ordinary]).double()
    assert_chi_square(counts, length * share)
    counts = torch.bincount(drawn.cpu(), minlength=VOCAB)
    others = [i for i in range(VOCAB) if i not in {5, *SPECIAL.tolist()}]
    assert counts[others].sum() == len(drawn)
    assert_chi_square(counts[others], len(drawn) / len(others))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length, count", [(0, 0), (0, 3), (9, 0)])
def test_mask_empty(device, length, count):
    tokens = make_tokens(length, device)
    masked, position, target = run(tokens, 0, count)
    assert torch.equal(masked, tokens)
    assert position.tolist() == [0] * count and target.tolist() == [-100] * count
    no_special = torch.empty(0, dtype=torch.int64)
    assert (run(make_tokens(30, device), 0, 30, special=no_special)[2] >= 0).all()


def make_slots(length, count, device="cpu"):
    """Tokens, positions, targets (the last slot unused) and samples, a third of them hits."""
    tokens = make_tokens(length, device)
    _, position, target = run(tokens, 2, count)
    target[-1:] = -100
    generator = torch.Generator().manual_seed(1)
    sample = torch.randint(VOCAB, (count,), generator=generator).to(device)
    sample[::3] = target[::3].clamp_min(0)
    return tokens, position, target, sample


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length, count", [(50, 7), (333, 50), (20_001, 3000)])
def test_replace_matches_reference(device, length, count):
    tokens, position, target, sample = make_slots(length, count, device)
    actual = replace_tokens(tokens, position, target, sample, pad_id=1)
    expected = reference.replace_tokens(
        *(t.cpu() for t in (tokens, position, target, sample)), pad_id=1
    )
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("device", DEVICES)
def test_replace_by_hand(device):
    tokens, position, target, sample = (
        torch.tensor(t, device=device)
        for t in ([9, 5, 6, 1, 1], [1, 2, 0], [5, 6, -100], [8, 6, 3])
    )
    corrupted, label = replace_tokens(tokens, position, target, sample, pad_id=1)
    assert corrupted.tolist() == [9, 8, 6, 1, 1]
    assert label.tolist() == [0, 1, 0, 255, 255] and label.dtype == torch.uint8


@pytest.mark.parametrize("device", DEVICES)
def test_replace_empty(device):
    none = torch.empty(0, dtype=torch.int64, device=device)
    corrupted, label = replace_tokens(none, none, none, none, pad_id=1)
    assert corrupted.shape == label.shape == (0,)
    tokens = make_tokens(9, device)
    corrupted, label = replace_tokens(tokens, none, none, none, pad_id=1)
    assert torch.equal(corrupted, tokens) and not (label % 255).any()


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_input(device):
    tokens, position, target, sample = make_slots(300, 40, device)
    double = torch.stack([tokens, tokens], 1)[:, 0]
    for a, b in zip(run(double, 4, 30), run(tokens, 4, 30), strict=True):
        assert torch.equal(a, b)
    strided = [t.repeat_interleave(2)[::2] for t in (tokens, position, target, sample)]
    for a, b in zip(
        replace_tokens(*strided, pad_id=1),
        replace_tokens(tokens, position, target, sample, pad_id=1),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_bitwise_repeat(device):
    tokens = make_tokens(100_003, device)
    _, position, target = run(tokens, 5, 15_000)
    assert_bitwise_repeatable(
        lambda: [
            *run(tokens, 5, 15_000),
            *replace_tokens(tokens, position, target, target.flip(0), pad_id=1),
        ]
    )


@pytest.mark.parametrize("device", DEVICES)
def test_seed_matters(device):
    tokens = make_tokens(500, device)
    first = run(tokens, 5, 70)[1]
    assert not torch.equal(first, run(tokens, 6, 70)[1])
    assert not torch.equal(first, run(tokens, 5 + 2**32, 70)[1])


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    tokens, position, target, sample = make_slots(60, 9, device)
    seed = torch.tensor([1], device=device)
    arguments = (tokens, SPECIAL.to(device), seed, 9, MASK, VOCAB, 0.8, 0.1)
    torch.library.opcheck(torch.ops.metro.mask_tokens, arguments)
    arguments = (tokens, position, target, sample, 1)
    torch.library.opcheck(torch.ops.metro.replace_tokens, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    special = SPECIAL.to(device)

    def corrupt(tokens, seed):
        masked, position, target = mask_tokens(tokens, special, seed, count=9, **OPTIONS)
        return masked, *replace_tokens(tokens, position, target, target.flip(0), pad_id=1)

    arguments = (make_tokens(60, device), torch.tensor([1], device=device))
    compiled = torch.compile(corrupt, fullgraph=True)
    for a, b in zip(compiled(*arguments), corrupt(*arguments), strict=True):
        assert torch.equal(a, b)


T = torch.tensor([5, 6, 8])
SEED = torch.tensor([0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": T[None]}, r"mask_tokens: tokens must have shape \[\*\], found \[1, 3\]"),
        ({"tokens": T.int()}, "tokens must be int64, found int32"),
        ({"tokens": T + 45}, r"tokens must lie in \[0, vocab_size = 50\), found 50 at 0"),
        ({"tokens": T - 6}, "tokens must lie in .* found -1 at 0"),
        ({"special": SPECIAL.int()}, "special must be int64, found int32"),
        ({"special": SPECIAL.flip(0)}, "special must be ascending and distinct, found 49 before"),
        ({"special": torch.tensor([3, 3])}, "special must be ascending and distinct, found 3"),
        ({"special": torch.tensor([50])}, "special must lie in .* found 50 at 0"),
        ({"seed": SEED.double()}, "seed must be int64, found float64"),
        ({"seed": T}, r"seed must hold one int64, found shape \[3\]"),
        ({"count": -1}, "count must not be negative, found -1"),
        ({"mask_id": 50}, "mask_id must lie in .* found 50"),
        ({"vocab_size": 0}, r"vocab_size must lie in \[1, 2\^31\), found 0"),
        ({"mask_fraction": 1.1}, r"mask_fraction must lie in \[0, 1\], found 1.1"),
        ({"random_fraction": -0.1}, r"random_fraction must lie in \[0, 1\], found -0.1"),
        ({"random_fraction": 0.3}, r"mask_fraction \+ random_fraction must not exceed 1"),
        ({"special": torch.arange(50)}, "needs an id that is not special, found 50 special ids"),
    ],
)
def test_mask_bad_arguments(changes, message):
    arguments = {"tokens": T, "special": SPECIAL, "seed": SEED, "count": 2} | OPTIONS
    with pytest.raises(RuntimeError, match=message):
        mask_tokens(**arguments | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"position": T - 2}, r"replace_tokens: position must lie in \[0, 3\), found 3 at 0"),
        ({"position": T - 6}, r"position must lie in \[0, 3\), found -1 at 0"),
        (
            {"tokens": torch.full((3,), MASK)},
            "tokens must be the original ones, .* expected 5 at position 0, found 7",
        ),
        ({"target": T[:2]}, r"target must have shape \[3\], found \[2\]"),
        ({"sample": T[:2]}, r"sample must have shape \[3\], found \[2\]"),
        ({"sample": T.int()}, "sample must be int64, found int32"),
    ],
)
def test_replace_bad_arguments(changes, message):
    arguments = {"tokens": T, "position": torch.arange(3), "target": T, "sample": T, "pad_id": 1}
    with pytest.raises(RuntimeError, match=message):
        replace_tokens(**arguments | changes)


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
def test_devices_may_not_be_mixed():
    with pytest.raises(RuntimeError, match="special must be on the device of tokens"):
        mask_tokens(T.cuda(), SPECIAL, SEED.cuda(), count=1, **OPTIONS)
