"""Documents from .txt and .jsonl files, plain or compressed, in constant memory.

In a .txt file a document is a run of lines between blank lines; the end of a file ends a document
too. In a .jsonl file a document is one field of one line. Either way it comes out as a stream of
paragraphs, a paragraph being one line of the document, so that a document may be longer than
memory. A line longer than `PARAGRAPH_BYTES` is cut at a space: the tokenizer treats a line break as
a space, so the cut changes no token. (One without any space is cut between two characters.)
"""

import contextlib
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from metro_ext.errors import UserError

FORMATS = (".txt", ".jsonl")
COMPRESSIONS = ("", ".gz", ".xz")
SUFFIXES = tuple(f + c for f in FORMATS for c in COMPRESSIONS)

PARAGRAPH_BYTES = 1 << 16
JSON_LINE_BYTES = 1 << 28  # one JSON object has to be parsed whole


class Paragraph(NamedTuple):
    """One line of a document, without its line break; never blank."""

    text: str
    starts_document: bool


def find_text_files(inputs: Iterable[str | os.PathLike]) -> list[Path]:
    """The text files named by `inputs`: files as they are, folders searched recursively.

    Args:
        inputs: files ending in one of `SUFFIXES`, or folders, whose other files are passed over.

    Returns:
        The files, in the order of `inputs`, those of a folder sorted by path.

    Raises:
        UserError: a path that does not exist, a suffix that is not known, an empty file, or no
            file at all.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not found:
                raise UserError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
            files += found
        elif not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: expected a name that ends in one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise UserError("no input: name at least one text file or folder")
    for file in files:
        if file.is_file() and file.stat().st_size == 0:
            raise _empty(file)
    return files


def read_paragraphs(path: str | os.PathLike, jsonl_field: str = "text") -> Iterator[Paragraph]:
    """Stream the paragraphs of one file.

    Args:
        path: a file ending in one of `SUFFIXES`.
        jsonl_field: the field of each .jsonl line that holds the document's text.

    Raises:
        UserError: an empty file, damaged compression, invalid UTF-8, a .jsonl line that is no JSON
            object or lacks the field; the message names the file and the line.
    """
    path = Path(path)
    with open_binary(path) as stream, reporting_damage(path):
        # One byte ahead: an empty file is a mistake of the user's, found here also when packed.
        if not stream.peek(1):
            raise _empty(path)
        if path.name.removesuffix(".gz").removesuffix(".xz").endswith(".jsonl"):
            yield from _read_jsonl(stream, path, jsonl_field)
        else:
            yield from _read_text(stream, path)


@contextlib.contextmanager
def reporting_damage(path: Path) -> Iterator[None]:
    """What a decompressor says of damaged bytes, as a UserError that names the file."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the compressed file is damaged or cut short ({error})") from error


def open_binary(path: Path) -> io.BufferedReader:
    """The bytes of a file, those of a .gz or .xz file decompressed."""
    # Short lines are read many times faster through one more buffer than by the decompressors.
    if path.name.endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.name.endswith(".xz"):
        return io.BufferedReader(lzma.open(path, "rb"))
    return open(path, "rb")


def _empty(path: Path) -> UserError:
    return UserError(f"{path}: the file is empty: remove it or give it some text")


def _read_text(stream: io.BufferedReader, path: Path) -> Iterator[Paragraph]:
    starts_document = True
    for text, whole in _read_lines(stream, path):
        if text and not text.isspace():
            yield Paragraph(text, starts_document)
            starts_document = False
        elif whole:
            starts_document = True


def _read_lines(stream: io.BufferedReader, path: Path) -> Iterator[tuple[str, bool]]:
    """Lines as (text, whether this is the whole line), those too long in several pieces."""
    line, offset, rest, starts_line = 1, 0, b"", True
    while True:
        raw = rest + stream.readline(PARAGRAPH_BYTES - len(rest))
        if not raw:
            return
        ends_line = raw.endswith(b"\n") or len(raw) < PARAGRAPH_BYTES
        cut = len(raw) if ends_line else _cut_before(raw)
        text = decode(raw[:cut], path, line, offset)
        yield text.rstrip("\r\n"), starts_line and ends_line
        offset += cut
        rest = raw[cut:]
        starts_line = ends_line
        line += ends_line


def _cut_before(raw: bytes) -> int:
    """Where to cut a piece of a long line: after its last space, else between two characters."""
    space = raw.rfind(b" ")
    if space > 0:
        return space + 1
    cut = len(raw)
    while cut > len(raw) - 4 and raw[cut - 1] & 0xC0 == 0x80:  # UTF-8 continuation bytes
        cut -= 1
    return cut - 1


def decode(raw: bytes, path: Path, line: int, offset: int) -> str:
    """A piece of a file that begins at byte `offset` as text; UserError names the line."""
    try:
        # A byte order mark is no part of the text.
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: line {line} is not valid UTF-8 (byte 0x{error.object[error.start]:02x} at "
            f"offset {offset + error.start}): convert the file to UTF-8"
        ) from error


def _read_jsonl(stream: io.BufferedReader, path: Path, field: str) -> Iterator[Paragraph]:
    line, offset = 0, 0
    while raw := stream.readline(JSON_LINE_BYTES):
        line += 1
        if len(raw) == JSON_LINE_BYTES:
            raise UserError(f"{path}: line {line} is longer than {JSON_LINE_BYTES} bytes")
        decoded = decode(raw, path, line, offset)
        offset += len(raw)
        if decoded.isspace():
            continue
        starts_document = True
        for text in _json_field(decoded, path, line, field).split("\n"):
            for piece in _cut_text(text):
                if piece and not piece.isspace():
                    yield Paragraph(piece, starts_document)
                    starts_document = False


def _cut_text(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PARAGRAPH_BYTES:
        limit = start + PARAGRAPH_BYTES
        cut = text.rfind(" ", start, limit) + 1 or limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _json_field(decoded: str, path: Path, line: int, field: str) -> str:
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {line} is not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{path}: line {line}: expected a JSON object, found {type(record).__name__}"
        )
    if field not in record:
        names = ", ".join(sorted(record)[:8]) or "none"
        raise UserError(
            f"{path}: line {line} has no field {field!r} (its fields: {names}): name the field "
            "that holds the text with --jsonl-field"
        )
    text = record[field]
    if not isinstance(text, str):
        raise UserError(
            f"{path}: line {line}: expected text in field {field!r}, found {type(text).__name__}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path}: line {line}: field {field!r} holds half of a surrogate pair at character "
            f"{error.start}, which is no text"
        ) from error
    return text
