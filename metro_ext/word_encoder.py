"""Ids of much text at once: a word is encoded once and remembered.

sentencepiece merges the characters of a whole line. Where no piece of the vocabulary has a space
but at its beginning, no merge joins two words, so the ids of a line are those of its words, one
after the other; and text repeats its words. `splits_at_spaces` looks up in the model whether that
holds; a model for which it does not is used on whole lines.
"""

import itertools

import numpy as np
import sentencepiece

from metro_ext.tokenizer import SPACE_PIECE, Tokenizer
from metro_ext.tokenizer_json import CHARACTER_MAP, NORMALIZER_SPEC, message_fields

# What is remembered before all is forgotten: about 250 bytes a word, 4 an id.
REMEMBERED_WORDS = 1 << 17
REMEMBERED_IDS = 1 << 20
# What is longer hardly comes back: text without spaces, addresses.
LONGEST_REMEMBERED = 64

# Fields of sentencepiece_model.proto as (number, default, value that lets a text be split).
_TRAINER_SPEC = 2
_MODEL_TYPE, _SPACE_AS_SUFFIX = (3, 1, 2), (24, 0, 0)  # BPE
_DUMMY_PREFIX, _FOLD_SPACES, _ESCAPE_SPACES = (3, 1, 1), (4, 1, 1), (5, 1, 1)


class WordEncoder:
    """Encodes many texts as `Tokenizer.encode` does one. Not for several threads at once."""

    _ids: np.ndarray
    _starts: np.ndarray

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._splits = splits_at_spaces(tokenizer)
        self._forget()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the texts, one text after the other, without `<s>` and `</s>`.

        Returns:
            uint32 [N], and int64 [len(texts)]: the number of ids of each text.

        Raises:
            UserError: a text is not valid Unicode.
        """
        words: list[str] = []
        ends = [0]
        for text in texts:
            # The character "▁" is a space to sentencepiece too: such text is left in one piece.
            words += text.split(" ") if self._splits and SPACE_PIECE not in text else (text,)
            ends.append(len(words))
        ids, lengths = self._encode_words(words)
        borders = np.concatenate(([0], np.cumsum(lengths)))[ends]
        return ids, np.diff(borders)

    def _encode_words(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the words, uint32 [N], and the number of ids of each."""
        rows = np.fromiter(map(self._words.__getitem__, words), np.int64, len(words))
        self._learn()
        starts, lengths = self._starts[rows], np.diff(self._starts)[rows]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if ends.size else 0
        # Token t of all stands at start + t - (tokens before its word) in the table.
        ids = self._ids[np.arange(total) + np.repeat(starts - ends + lengths, lengths)]
        if len(self._words) > REMEMBERED_WORDS or self._ids.size > REMEMBERED_IDS:
            self._forget()
        return ids, lengths

    def _learn(self) -> None:
        """Append the rows of the words that were asked for first."""
        if not self._words.new:
            return
        lists = self._tokenizer.encode_batch(self._words.new)
        self._words.new.clear()
        ids = np.fromiter(itertools.chain.from_iterable(lists), np.uint32)
        ends = np.cumsum([len(one) for one in lists]) + self._ids.size
        self._ids = np.concatenate((self._ids, ids))
        self._starts = np.concatenate((self._starts, ends))

    def _forget(self) -> None:
        self._words = _Rows()
        self._ids = np.zeros(0, np.uint32)  # of all rows
        self._starts = np.zeros(1, np.int64)  # of each row among them, and the end


class _Rows(dict):
    """Word -> row of the table; an unknown word gets the next row and is put down in `new`."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []
        self._count = 0

    def __missing__(self, word: str) -> int:
        row = self._count
        self._count += 1
        self.new.append(word)
        if len(word) <= LONGEST_REMEMBERED:
            self[word] = row
        return row


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are those of its parts between spaces (U+0020).

    It asks for byte-pair merges, for spaces that are folded, marked and put before a word, for a
    character map that replaces nothing with a space in it, and for no piece with a space after
    its first character. Models of `metro_ext.tokenizer` have all that.
    """
    try:
        model = message_fields(tokenizer.model)
        trainer, normalizer = (
            message_fields(model.get(n, b"")) for n in (_TRAINER_SPEC, NORMALIZER_SPEC)
        )
        map_keeps_spaces = not _replaces_spaces(normalizer.get(CHARACTER_MAP, b""))
    except (ValueError, TypeError):  # nothing is known of a model that only sentencepiece can read
        return False
    settings = [(trainer, f) for f in (_MODEL_TYPE, _SPACE_AS_SUFFIX)]
    settings += [(normalizer, f) for f in (_DUMMY_PREFIX, _FOLD_SPACES, _ESCAPE_SPACES)]
    if any(spec.get(number, default) != wanted for spec, (number, default, wanted) in settings):
        return False
    if not map_keeps_spaces:
        return False
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    pieces = map(processor.id_to_piece, range(processor.vocab_size()))
    return not any(SPACE_PIECE in piece[1:] for piece in pieces)


def _replaces_spaces(character_map: bytes) -> bool:
    """Whether a key may hold a space, or a replacement hold "▁", by the map's raw form.

    See `metro_ext.tokenizer_json.character_map_entries`: a unit of the double array that is
    reached by the byte 0x20 carries it as its label.
    """
    if not character_map:
        return False
    length = int.from_bytes(character_map[:4], "little")
    units = np.frombuffer(character_map, "<u4", length // 4, offset=4)
    spaces = (units & np.uint32(0x800000FF)) == ord(" ")
    return bool(spaces.any()) or SPACE_PIECE.encode() in character_map[4 + length :]
