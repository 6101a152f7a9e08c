import numpy as np
from philox_reference import half_words, philox4x32


def test_known_answers():
    """The vectors that come with the authors' implementation (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    assert [hex(w) for w in philox4x32(0, 0, 0, 0, 0)] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    assert [hex(w) for w in philox4x32(2**64 - 1, ones, ones, ones, ones)] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]


def test_half_words_are_the_words_low_half_first():
    words = np.array([0x22221111, 0x44443333, 0x66665555, 0x88887777], dtype=np.uint64)
    assert [hex(h) for h in half_words(words)] == [f"0x{i}{i}{i}{i}" for i in range(1, 9)]
