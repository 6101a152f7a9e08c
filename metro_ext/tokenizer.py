"""Byte-pair encoding by sentencepiece, with the ids that Hugging Face's MPNet fixes.

    python -m metro_ext.tokenizer train TEXT... --vocab-size 32000 --output FILE.model
    python -m metro_ext.tokenizer encode --tokenizer FILE.model "some text"
    python -m metro_ext.tokenizer decode --tokenizer FILE.model 17 403 8

The settings are those that a generic fast tokenizer (`tokenizer.json`) can reproduce: a
precompiled normaliser, one leading space, runs of spaces folded, merges ranked by score, bytes for
characters that the vocabulary lacks.
"""

import argparse
import hashlib
import heapq
import io
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from metro_ext.atomic import atomic_write
from metro_ext.command_line import at_least, run
from metro_ext.errors import UserError
from metro_ext.text_files import FIELD_HELP, PARAGRAPH_BYTES, find_text_files, read_paragraphs

BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
BOS_PIECE, PAD_PIECE, EOS_PIECE, UNK_PIECE = "<s>", "<pad>", "</s>", "<unk>"
MASK_PIECE = "[MASK]"
TOKENIZER_FILE = "tokenizer.model"  # in the folder of a run and of an export
SPACE_PIECE = "▁"

# Stands for [MASK] while sentencepiece reads the text around it: a private-use character, which no
# normaliser touches and, as training leaves it out, no piece holds: it is written in bytes.
_MASK_STAND_IN = "\U0010fffd"

DEFAULT_SAMPLE_BYTES = 1 << 27


class Tokenizer:
    """A trained sentencepiece model; immutable."""

    bos_id, pad_id, eos_id, unk_id = BOS_ID, PAD_ID, EOS_ID, UNK_ID

    def __init__(self, model: bytes):
        """Take the bytes of a model made by `train_tokenizer`.

        Raises:
            UserError: the bytes are no such model.
        """
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            pieces = self._processor.id_to_piece(list(range(self._processor.vocab_size())))
        except (RuntimeError, IndexError, UnicodeDecodeError) as error:
            raise UserError("not a sentencepiece model: the bytes cannot be read as one") from error
        expected = [BOS_PIECE, PAD_PIECE, EOS_PIECE, UNK_PIECE]
        if pieces[: len(expected)] != expected:
            raise UserError(
                f"the tokenizer's first ids must be {' '.join(expected)}, found "
                f"{' '.join(pieces[: len(expected)])}: train it with python -m metro_ext.tokenizer"
            )
        self.mask_id = self._processor.piece_to_id(MASK_PIECE)
        if not self._processor.is_control(self.mask_id):
            raise UserError(
                f"the tokenizer has no control symbol {MASK_PIECE}: train it with "
                "python -m metro_ext.tokenizer"
            )
        if self._processor.piece_to_id(_MASK_STAND_IN) != UNK_ID:
            raise UserError("the tokenizer's vocabulary holds U+10FFFD, which is reserved")
        self.model = model
        self.vocab_size = self._processor.vocab_size()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.special_ids = (BOS_ID, PAD_ID, EOS_ID, UNK_ID, self.mask_id)
        self.cased = "A" in self._processor.normalize("A")
        self._space_id = self._processor.piece_to_id(SPACE_PIECE)
        self._stand_in_ids = self._processor.encode(_MASK_STAND_IN)[1:]  # after the leading space

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a model file; UserError if it is none."""
        try:
            return cls(Path(path).read_bytes())
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write the model file, atomically."""
        with atomic_write(path) as file:
            file.write(self.model)

    def encode(self, text: str, allow_mask: bool = False) -> list[int]:
        """Ids of a text, without `<s>` and `</s>`.

        Args:
            text: any text; line breaks count as spaces.
            allow_mask: whether "[MASK]" in the text means the mask token. By default it is text
                like any other, so that no corpus can smuggle in a special id.
        """
        if not allow_mask or MASK_PIECE not in text:
            return self._encode(text)
        text = text.replace(_MASK_STAND_IN, "").replace(MASK_PIECE, _MASK_STAND_IN)
        return self._put_masks(self._encode(text))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        return self._encode(list(texts), num_threads=threads)

    def encode_with_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """`encode`, and the characters of the text that each id stands for.

        Returns:
            The ids, and int64 [ids, 2]: first character and the one past the last. The space that
            a piece begins with is left out, so a bare "▁" has an empty span. Pieces and bytes that
            share one character of the text (of "½", say) all have that character.
        """
        ids = self.encode(text)
        if not ids:
            return ids, np.zeros((0, 2), np.int64)
        normalised, offsets = self._processor.normalize(text, with_offsets=True)
        starts = np.array(offsets, np.int64)
        # A character of the normalised text ends where the next one of the text itself begins.
        following = np.searchsorted(starts, starts[:-1], side="right")
        ends = starts[np.minimum(following, len(starts) - 1)]
        spans = np.zeros((len(ids), 2), np.int64)
        place = bytes_read = 0  # in the normalised text; bytes of the character at `place`
        for row, (one, piece) in enumerate(zip(ids, self.pieces(ids), strict=True)):
            if self._processor.is_byte(one):
                spans[row] = starts[place], ends[place]
                bytes_read += 1
                if bytes_read == len(normalised[place].encode()):
                    place, bytes_read = place + 1, 0
                continue
            first, place = place, place + len(piece)
            while first < place and normalised[first] == SPACE_PIECE:
                first += 1
            spans[row] = starts[first], ends[place - 1] if first < place else starts[first]
        if place != len(normalised):
            raise RuntimeError(f"the pieces cover {place} of {len(normalised)} characters")
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special ids vanish. UserError for an id outside the vocabulary."""
        return self._processor.decode(self._checked(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's entry for each id; "▁" marks a leading space."""
        return [self._processor.id_to_piece(i) for i in self._checked(ids)]

    def _encode(self, text: str | list[str], **options: Any) -> list[Any]:
        try:
            return self._processor.encode(text, **options)
        except (UnicodeEncodeError, RuntimeError, TypeError) as error:  # as its release has it
            for one in [text] if isinstance(text, str) else text:
                if any("\ud800" <= character <= "\udfff" for character in one):
                    raise UserError("the text is not valid Unicode (a lone surrogate)") from error
            raise

    def _put_masks(self, ids: list[int]) -> list[int]:
        """Replace the stand-in's pieces by the mask id, and with them the space they carried.

        In training a mask replaces a whole piece, its leading space included, so a mask never
        follows a bare "▁".
        """
        result: list[int] = []
        width = len(self._stand_in_ids)
        position = 0
        while position < len(ids):
            if ids[position : position + width] == self._stand_in_ids:
                if result and result[-1] == self._space_id:
                    result.pop()
                result.append(self.mask_id)
                position += width
            else:
                result.append(ids[position])
                position += 1
        return result

    def _checked(self, ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"expected ids from 0 to {self.vocab_size - 1}, found {i}")
        return ids


def train_tokenizer(
    inputs: Iterable[str | os.PathLike],
    vocab_size: int,
    cased: bool = False,
    field: str = "text",
    character_coverage: float = 0.9995,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    seed: int = 0,
) -> Tokenizer:
    """Train a byte-pair encoding on text files; the same input gives the same model.

    Args:
        inputs: text files or folders (`metro_ext.text_files`).
        vocab_size: the exact number of ids, the five special ones and 256 bytes included.
        cased: keep capital letters; otherwise sentencepiece's normaliser folds case.
        field: the field of .jsonl lines, the column of .parquet files, that holds the text.
        character_coverage: share of the text's characters that get a piece of their own; the rest
            is written in bytes.
        sample_bytes: train on a random sample of the paragraphs of about this size if the text is
            larger, so that memory stays bounded.
        seed: of that sample.

    Raises:
        UserError: bad input, or a vocabulary that the text cannot fill.
    """
    if vocab_size < 1:
        raise UserError(f"expected a vocabulary of at least 1, found {vocab_size}")
    if not 0.98 <= character_coverage <= 1:  # sentencepiece's own limits
        raise UserError(f"expected a character coverage in 0.98 ... 1, found {character_coverage}")
    texts = (
        paragraph.text.replace(_MASK_STAND_IN, "")
        for file in find_text_files(inputs)
        for paragraph in read_paragraphs(file, field)
    )
    sample = sample_texts(texts, sample_bytes, seed)
    if not sample:
        raise UserError("the input holds no text: nothing to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=character_coverage,
            normalization_rule_name="nmt_nfkc" if cased else "nmt_nfkc_cf",
            bos_id=BOS_ID,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_piece=BOS_PIECE,
            pad_piece=PAD_PIECE,
            eos_piece=EOS_PIECE,
            unk_piece=UNK_PIECE,
            control_symbols=[MASK_PIECE],
            max_sentence_length=4 * PARAGRAPH_BYTES,  # longer lines would be left out
            num_threads=1,  # written into the model: a machine's core count must not change it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _vocabulary_error(vocab_size, str(error)) from error
    return Tokenizer(model.getvalue())


def sample_texts(texts: Iterable[str], sample_bytes: int, seed: int) -> list[str]:
    """A uniform sample of the texts of at most `sample_bytes` of UTF-8, in their order.

    Each text draws a random key; those with the smallest keys stay. Memory is bounded by the
    sample, whatever the number of texts.
    """
    generator = random.Random(seed)
    kept: list[tuple[float, int, str, int]] = []  # a heap, the largest key first
    total, threshold = 0, 1.0
    for index, text in enumerate(texts):
        key = generator.random()
        if key >= threshold:
            continue
        size = len(text.encode())
        heapq.heappush(kept, (-key, index, text, size))
        total += size
        while total > sample_bytes and len(kept) > 1:
            largest = heapq.heappop(kept)
            threshold = -largest[0]
            total -= largest[3]
    return [text for _, _, text, _ in sorted(kept, key=lambda item: item[1])]


def _vocabulary_error(vocab_size: int, message: str) -> Exception:
    if most := re.search(r"too high.*<= (\d+)", message):
        return UserError(
            f"a vocabulary of {vocab_size} is too large for this text: the largest possible is "
            f"{most[1]}; ask for less or give more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"a vocabulary of {vocab_size} is too small: this text needs at least {least[1]} for "
            "its special symbols, the 256 bytes and its characters"
        )
    return UserError(f"sentencepiece could not train a vocabulary of {vocab_size}: {message}")


def _train(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if output.exists():
        raise UserError(f"{output}: it exists already: remove it or name another")
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(
        arguments.inputs,
        arguments.vocab_size,
        cased=arguments.cased,
        field=arguments.field,
        character_coverage=arguments.character_coverage,
        sample_bytes=arguments.sample_bytes,
        seed=arguments.seed,
    )
    tokenizer.save(output)
    case = "cased" if tokenizer.cased else "uncased"
    print(f"{output}: {tokenizer.vocab_size} pieces, {case}, sha256 {tokenizer.sha256}")


def _encode(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(arguments.tokenizer)
    for text in arguments.text or _standard_input():
        ids = tokenizer.encode(text, allow_mask=arguments.allow_mask)
        print(*(tokenizer.pieces(ids) if arguments.pieces else ids))


def _decode(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(arguments.tokenizer)
    for line in [" ".join(arguments.ids)] if arguments.ids else _standard_input():
        try:
            ids = [int(word) for word in line.split()]
        except ValueError as error:
            raise UserError(f"expected ids, whole numbers with spaces between: {error}") from error
        print(tokenizer.decode(ids))


def _standard_input() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: line {number} is not valid UTF-8") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m metro_ext.tokenizer",
        description="Train and use a subword tokenizer.",
    )
    commands = parser.add_subparsers(required=True, metavar="train|encode|decode")

    train = commands.add_parser("train", help="train a byte-pair encoding on text files")
    train.add_argument("inputs", nargs="+", metavar="INPUT", help="text file or folder")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N")
    train.add_argument("--output", required=True, metavar="FILE", help="the model file to write")
    case = train.add_mutually_exclusive_group()
    case.add_argument("--cased", action="store_true", help="keep capital letters")
    case.add_argument("--uncased", action="store_false", dest="cased", help="fold case (default)")
    train.set_defaults(cased=False)
    train.add_argument("--field", default="text", metavar="NAME", help=FIELD_HELP)
    train.add_argument("--character-coverage", type=float, default=0.9995, metavar="SHARE")
    size = at_least(1)
    train.add_argument("--sample-bytes", type=size, default=DEFAULT_SAMPLE_BYTES, metavar="N")
    train.add_argument("--seed", type=int, default=0, help="of the sample of a larger text")
    train.set_defaults(command=_train)

    encode = commands.add_parser("encode", help="text to ids, a line for each text")
    encode.add_argument("text", nargs="*", metavar="TEXT", help="default: lines of standard input")
    encode.add_argument("--tokenizer", required=True, metavar="FILE")
    encode.add_argument("--pieces", action="store_true", help="print pieces instead of ids")
    encode.add_argument("--allow-mask", action="store_true", help="[MASK] means the mask token")
    encode.set_defaults(command=_encode)

    decode = commands.add_parser("decode", help="ids to text")
    decode.add_argument("ids", nargs="*", metavar="ID", help="default: lines of standard input")
    decode.add_argument("--tokenizer", required=True, metavar="FILE")
    decode.set_defaults(command=_decode)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    arguments.command(arguments)


if __name__ == "__main__":
    run(main)
