"""Philox4x32-10 and the numbers made from it, in numpy, as csrc/common/philox.h defines them."""

import numpy as np

SAMPLE = 4  # Purpose::kSample


def philox4x32(seed: int, c0, c1, c2, c3) -> np.ndarray:
    """The four 32-bit words [4, ...] of the counters (c0, c1, c2, c3), which may be arrays."""
    counters = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3)))
    c0, c1, c2, c3 = (c.copy() for c in counters)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (p1 >> 32) ^ c1 ^ np.uint64(k0), (p0 >> 32) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & low, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def counter_word(purpose: int, draw: int) -> int:
    return (purpose << 24) | draw


def uniform(word: np.ndarray) -> np.ndarray:
    """Midpoints of 2^23 equal cells of (0, 1)."""
    return ((word >> 9) + 0.5) * 2.0**-23


def gumbel(word: np.ndarray) -> np.ndarray:
    return -np.log(-np.log(uniform(word)))
