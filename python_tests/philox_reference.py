"""The random numbers of csrc/common/philox.h in plain NumPy, written from the definition.

Philox4x32-10: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np
import torch

HIDDEN_DROPOUT, ATTENTION_DROPOUT, MASK, SAMPLE = 1, 2, 3, 4  # Purpose

_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(seed: int, c0, c1, c2, c3) -> np.ndarray:
    """Ten rounds on counters of any (broadcastable) shape: uint64 [..., 4], each below 2^32."""
    c = [np.asarray(x, dtype=np.uint64) for x in np.broadcast_arrays(c0, c1, c2, c3)]
    seed %= 2**64
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c[0]
        p1 = np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> _WORD) ^ c[1] ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _WORD) ^ c[3] ^ np.uint64(k1),
            p0 & _LOW,
        ]
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1)


def counter_word(purpose: int, draw: int) -> int:
    return purpose << 24 | draw & 0xFFFFFF


def half_words(words: np.ndarray) -> np.ndarray:
    """The eight 16-bit numbers of each call, low half of a word first: [..., 4] -> [..., 8]."""
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    return halves.reshape(*words.shape[:-1], 8)


def hidden_dropout_factor(seed: int, p: float, draw: int, shape) -> torch.Tensor:
    """What dropout multiplies each element by, float64: 0, or 1 / (share kept)."""
    elements = int(np.prod(shape))
    index = np.arange((elements + 7) // 8, dtype=np.uint64)
    words = philox4x32(seed, index & _LOW, index >> _WORD, counter_word(HIDDEN_DROPOUT, draw), 0)
    threshold = int(p * 65536 + 0.5)
    keep = half_words(words).reshape(-1)[:elements] >= np.uint64(threshold)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return torch.from_numpy(keep.reshape(shape) * scale)


def mask_words(seed: int, tokens: int) -> np.ndarray:
    """The four words that each token's masking is decided by: [tokens, 4]."""
    index = np.arange(tokens, dtype=np.uint64)
    return philox4x32(seed, index & _LOW, index >> _WORD, counter_word(MASK, 0), 0)


def uniform(word: np.ndarray) -> np.ndarray:
    """Midpoints of 2^23 equal cells of (0, 1)."""
    return ((word >> 9) + 0.5) * 2.0**-23


def gumbel(word: np.ndarray) -> np.ndarray:
    return -np.log(-np.log(uniform(word)))
