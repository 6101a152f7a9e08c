"""The vocabulary head's samples: their scheme, what they depend on, their distribution."""

import math

import numpy as np
import philox_reference as philox
import pytest
import reference
import torch
from vocab_head_inputs import key, make_inputs

from metro_ext.ops import vocab_head

SAMPLE_TILE = 256


def sample_in_python(logits, seed, temperature, draw):
    """The scheme of vocab_head.h in float64, from float32 logits [N, V]."""
    scaled = logits.double().numpy() / temperature
    samples = []
    for row in range(logits.shape[0]):
        best, winner = -math.inf, None
        for tile, start in enumerate(range(0, logits.shape[1], SAMPLE_TILE)):
            z = scaled[row, start : start + SAMPLE_TILE]
            words = philox.philox4x32(seed, row, tile, philox.counter_word(philox.SAMPLE, draw), 0)
            value = z.max() + np.log(np.exp(z - z.max()).sum()) + philox.gumbel(words[0])
            if value > best:
                best, winner = value, (start, z, words[1])
        start, z, word = winner
        running = np.cumsum(np.exp(z - z.max()))
        samples.append(start + int(np.argmax(running > philox.uniform(word) * running[-1])))
    return torch.tensor(samples)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
@pytest.mark.parametrize("vocab", [40, 256, 5000])
def test_samples_are_those_of_the_scheme(vocab, temperature):
    hidden, weight, bias, target = make_inputs(60, 16, vocab, scale=2.0)
    seed = -(2**62) + 12345
    out = vocab_head(hidden, weight, bias, target, key(seed), temperature, 77)
    logits = reference.vocab_logits(hidden, weight, bias)
    expected = sample_in_python(logits, seed % 2**64, temperature, 77)
    # float32 against float64: a number within rounding of a border may fall on its other side.
    assert (out.sample == expected).float().mean() >= 0.98


def test_samples_depend_on_seed_and_draw_alone():
    inputs = make_inputs(200, 16, 3000)
    first = vocab_head(*inputs, key(1)).sample
    assert torch.equal(vocab_head(*inputs, key(1)).sample, first)
    assert not torch.equal(vocab_head(*inputs, key(2)).sample, first)
    assert not torch.equal(vocab_head(*inputs, key(1), draw=1).sample, first)
    other_targets = (*inputs[:3], inputs[3].flip(0))
    assert torch.equal(vocab_head(*other_targets, key(1)).sample, first)


def chi_square_p(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """P(chi-square >= observed), by the Wilson-Hilferty approximation; rare cells are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    variance = 2 / (9 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_samples_follow_the_softmax(temperature):
    draws, vocab = 200_000, 600
    generator = torch.Generator().manual_seed(6)
    bias = 1.5 * torch.randn(vocab, generator=generator)
    bias[:40] -= 4.0  # the tiles differ in weight
    hidden, weight = torch.ones(draws, 1), torch.zeros(vocab, 1)
    target = torch.full((draws,), -100)
    sample = vocab_head(hidden, weight, bias, target, key(2024), temperature).sample
    counts = np.bincount(sample.numpy(), minlength=vocab)
    exact = torch.softmax(bias.double() / temperature, 0).numpy()
    assert chi_square_p(counts, exact) > 1e-4
    # The test has power: it rejects a temperature 10 % off and a bias 0.1 off on every other token.
    warm = torch.softmax(bias.double() / (temperature * 1.1), 0).numpy()
    assert chi_square_p(counts, warm) < 1e-4
    shift = torch.zeros(vocab, dtype=torch.float64)
    shift[::2] = 0.1 * temperature
    assert chi_square_p(counts, torch.softmax((bias + shift) / temperature, 0).numpy()) < 1e-4
