"""``tokenizer.json`` for the generic fast tokenizer of Hugging Face, from a sentencepiece model.

The ids are sentencepiece's. Three things need care:

- sentencepiece replaces the longest match of its character map; the fast tokenizer's
  ``Precompiled`` step replaces the shortest match of a whole grapheme. So a separator (U+0001,
  which the map deletes) first goes between the matches. What the map makes of one of them is what
  NFKC makes of it, and then the map of each character (true of all its 220,000 keys of several
  characters): NFKC follows, and then separators between all characters, so that each is a grapheme
  of its own. U+FF5E, the one character that NFKC changes and the map keeps, is hidden from NFKC.
- A piece that can be merged from several pairs has one score in sentencepiece and the leftmost
  pair wins; here each pair has a rank, so the pairs of one piece are ordered to the same end.
- Deleted characters at the start of a text stay in the output of ``Precompiled``: they are removed
  after it.

What differs: the Cyrillic modifier letters U+1E030 ... U+1E06D with a mark after them, which the
library's NFKC, of an older Unicode, does not know. Special symbols in a text ("<s>", "[MASK]") mean
themselves here, as everywhere in that library; with ``split_special_tokens=True`` they are text, as
they are in `Tokenizer.encode`.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from metro_ext.atomic import atomic_write
from metro_ext.errors import UserError
from metro_ext.tokenizer import (
    BOS_PIECE,
    EOS_PIECE,
    MASK_PIECE,
    PAD_PIECE,
    SPACE_PIECE,
    TOKENIZER_FILE,
    UNK_PIECE,
    Tokenizer,
)

SEPARATOR, STAND_IN = "\x01", "\x02"  # the map deletes both
FULLWIDTH_TILDE = "\uff5e"
# Before and after every character beyond ASCII, and between the two that Unicode joins in ASCII.
_BETWEEN = r"(?<=[^\x00-\x7F])(?=[\s\S])|(?=[^\x00-\x7F])|(?<=\r)(?=\n)"
_BLOCK = 4096  # nodes of the character map that are looked at together
# Sentencepiece's own map, nmt_nfkc_cf, has 264,228 of them and keys of at most 12 bytes.
_MOST_NODES, _LONGEST_KEY = 1 << 22, 256
NORMALIZER_SPEC, CHARACTER_MAP = 3, 2  # field numbers in sentencepiece_model.proto


def tokenizer_document(tokenizer: Tokenizer) -> dict:
    """The content of ``tokenizer.json``.

    Raises:
        UserError: the model was not trained by `metro_ext.tokenizer`.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    size = processor.vocab_size()
    vocabulary = {processor.id_to_piece(i): i for i in range(size)}
    if len(vocabulary) != size:
        raise UserError("the tokenizer has two ids for one piece: train it with metro_ext")
    try:
        normalizer = message_fields(message_fields(tokenizer.model)[NORMALIZER_SPEC])
        character_map = normalizer[CHARACTER_MAP]
        entries = dict(character_map_entries(character_map))
    except (ValueError, LookupError) as error:
        raise UserError(
            "the tokenizer's character map cannot be read: train it with metro_ext"
        ) from error
    special = (BOS_PIECE, PAD_PIECE, EOS_PIECE, UNK_PIECE, MASK_PIECE)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocabulary[piece], "content": piece, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
            for piece in sorted(special, key=vocabulary.__getitem__)
        ],
        "normalizer": _normalizer(character_map, entries),
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_PIECE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": UNK_PIECE,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": True, "ignore_merges": False, "vocab": vocabulary,
            "merges": list(_merges(processor)),
        },
    }  # fmt: skip


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """``tokenizer.json``, ``tokenizer_config.json`` and the sentencepiece model itself.

    ``length``: the longest sequence, in tokens, that the model takes.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "bos_token": BOS_PIECE,
        "cls_token": BOS_PIECE,
        "eos_token": EOS_PIECE,
        "sep_token": EOS_PIECE,
        "pad_token": PAD_PIECE,
        "unk_token": UNK_PIECE,
        "mask_token": MASK_PIECE,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    documents = {
        "tokenizer.json": tokenizer_document(tokenizer),
        "tokenizer_config.json": config,
    }
    for name, document in documents.items():
        with atomic_write(folder / name, "w") as file:
            file.write(json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    tokenizer.save(folder / TOKENIZER_FILE)


def _normalizer(character_map: bytes, entries: Mapping[str, str]) -> dict:
    deleted = [key for key, value in entries.items() if not value]
    deleted_class = _class({key for key in deleted if len(key) == 1})

    def replace(pattern: str, content: str, kind: str = "Regex") -> dict:
        return {"type": "Replace", "pattern": {kind: pattern}, "content": content}

    return {
        "type": "Sequence",
        "normalizers": [
            replace(STAND_IN, SEPARATOR, "String"),
            replace(FULLWIDTH_TILDE, STAND_IN, "String"),
            replace(_after_matches(entries), SEPARATOR),
            {"type": "NFKC"},
            replace(STAND_IN, FULLWIDTH_TILDE, "String"),
            replace(_BETWEEN, SEPARATOR),
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(character_map).decode(),
            },
            replace(deleted_class, ""),
            replace("^ +", ""),
            replace(" +", SPACE_PIECE),
            replace(f"{SPACE_PIECE}+$", ""),
            {"type": "Prepend", "prepend": SPACE_PIECE},
        ],
    }


def _after_matches(keys: Iterable[str]) -> str:
    """A regular expression for the places after sentencepiece's matches, save inside ASCII.

    It consumes a key of several characters, the longest first, or one character; ``\\K`` makes what
    it matched empty, so that `Replace` inserts there.
    """
    root: dict = {}
    for key in keys:
        if len(key) > 1:
            node = root
            for character in key:
                node = node.setdefault(character, {})
            node[""] = {}
    second = _class({character for node in root.values() for character in node})
    inside, beyond = r"[\x00-\x7F]", r"[^\x00-\x7F]"
    several = rf"(?=[\s\S]{second}){_any_of(root)}"
    return rf"(?:{several}|{beyond}|\r(?=\n)|{inside}(?={beyond}))\K"


def _any_of(node: dict) -> str:
    """A regular expression for the words of a trie, in which the key "" ends a word."""
    alike: dict[str, set[str]] = {}  # what may follow -> the characters that it may follow
    for character, following in node.items():
        if character:
            alike.setdefault(_any_of(following), set()).add(character)
    words = "|".join(_class(characters) + rest for rest, characters in alike.items())
    if not words:
        return ""
    return f"(?:{words})" + ("?" if "" in node else "")


def _class(characters: set[str]) -> str:
    """A character class."""
    return "[" + "".join(f"\\x{{{ord(c):04X}}}" for c in sorted(characters)) + "]"


def _post_processor(vocabulary: dict[str, int]) -> dict:
    """<s> A </s> and <s> A </s></s> B </s>, as MPNet and RoBERTa have it."""

    def piece(name: str) -> dict:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    def sequence(name: str) -> dict:
        return {"Sequence": {"id": name, "type_id": 0}}

    single = [piece(BOS_PIECE), sequence("A"), piece(EOS_PIECE)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, piece(EOS_PIECE), sequence("B"), piece(EOS_PIECE)],
        "special_tokens": {
            name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]}
            for name in (BOS_PIECE, EOS_PIECE)
        },
    }


def _merges(processor: sentencepiece.SentencePieceProcessor) -> Iterator[list[str]]:
    """Pairs of pieces in the order in which sentencepiece would merge them."""
    normal = [
        processor.id_to_piece(i)
        for i in range(processor.vocab_size())
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
    ]
    known = set(normal)
    scores = {piece: processor.get_score(processor.piece_to_id(piece)) for piece in normal}
    # sorted() keeps ties in id order.
    for piece in sorted(normal, key=scores.__getitem__, reverse=True):
        splits = [k for k in range(1, len(piece)) if piece[:k] in known and piece[k:] in known]
        yield from ([piece[:k], piece[k:]] for k in _leftmost_first(piece, splits))


def _leftmost_first(piece: str, splits: list[int]) -> list[int]:
    """The splits of a piece so ordered that the leftmost of two overlapping pairs comes first.

    Pairs (l, m) and (m, r) of one piece overlap in m = piece[k:] = piece[:n - k]: split k, the left
    one, must have the smaller rank. In runs of one character both orders are asked for; merging
    from the left leaves the longer part there, so longer left parts go first.
    """
    length = len(piece)
    ordered: list[int] = []
    waiting = sorted(splits, reverse=True)
    while waiting:
        for k in waiting:
            before = length - k  # the split that must precede k if its pair overlaps to the left
            overlaps = before != k and before in waiting and piece[before:] == piece[:k]
            if not overlaps or piece[k:] == piece[:before]:
                break
        ordered.append(k)
        waiting.remove(k)
    return ordered


def character_map_entries(blob: bytes) -> Iterator[tuple[str, str]]:
    """The (key, replacement) pairs of sentencepiece's compiled character map.

    The blob is a darts-clone double array (its length in bytes first, little-endian) of the keys'
    UTF-8, whose values are offsets into the zero-terminated replacements that follow.

    Raises:
        ValueError, IndexError: it is damaged.
    """
    length = int.from_bytes(blob[:4], "little")
    units = np.frombuffer(blob, "<u4", length // 4, offset=4).astype(np.int64)
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    texts, byte = blob[4 + length :], np.arange(1, 256)
    waiting = [(offsets[:1], [b""])]  # nodes and the keys that lead to them, block by block
    nodes = 0
    while waiting:
        bases, keys = waiting.pop()
        nodes += len(keys)
        if nodes > _MOST_NODES or len(keys[0]) > _LONGEST_KEY:  # it goes round in circles
            raise ValueError("a character map without an end")
        places = bases[:, None] ^ byte
        labels = units[np.minimum(places, len(units) - 1)] & 0x800000FF
        rows, columns = np.nonzero((labels == byte) & (places < len(units)))
        places = places[rows, columns]
        longer = [
            keys[row] + bytes((column + 1,)) for row, column in zip(rows, columns, strict=True)
        ]
        bases = places ^ offsets[places]
        for i in np.flatnonzero(units[places] >> 8 & 1):  # a key ends here
            start = int(units[bases[i]] & 0x7FFFFFFF)
            yield longer[i].decode(), texts[start : texts.index(0, start)].decode()
        for first in range(0, len(longer), _BLOCK):
            block = slice(first, first + _BLOCK)
            waiting.append((bases[block], longer[block]))


def message_fields(message: Any) -> dict[int, Any]:
    """The last value of each field of a protobuf message: bytes, or a whole number.

    Raises:
        ValueError: it is not the bytes of a message.
    """
    found: dict[int, bytes | int] = {}
    place = 0

    def varint() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number of more than 64 bits")

    try:
        while place < len(message):
            field, wire = divmod(varint(), 8)
            if wire == 0:
                found[field] = varint()
            elif wire == 2:
                size = varint()
                found[field] = message[place : place + size]
                place += size
            else:
                place += {1: 8, 5: 4}[wire]
    except (LookupError, TypeError) as error:
        raise ValueError("not a protobuf message") from error
    if place != len(message):
        raise ValueError("a protobuf message that is cut")
    return found
