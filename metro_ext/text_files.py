"""Documents from .txt, .jsonl and .parquet files, in constant memory.

.txt and .jsonl may be compressed by gzip, xz or zstd. In a .txt file a document is a run of lines
between blank lines; the end of a file ends a document too. In a .jsonl file a document is one field
of one line, in a .parquet file a row of one column. Either way it comes out as a stream of
paragraphs, a paragraph being one line of the document, so that a document may be longer than
memory. A line longer than `PARAGRAPH_BYTES` is cut at a space: the tokenizer treats a line break as
a space, so the cut changes no token. (One without any space is cut between two characters.)

A file can be read in parts (`file_parts`), each by another process: the parts' documents, one part
after the other, are the file's.
"""

import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from metro_ext import parquet_files
from metro_ext.errors import UserError
from metro_ext.zstd_files import open_zstd

FORMATS = (".txt", ".jsonl")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
PARQUET = ".parquet"
SUFFIXES = (*(f + c for f in FORMATS for c in COMPRESSIONS), PARQUET)
FIELD_HELP = "field of .jsonl lines, column of .parquet files, with the text (text)"

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


class Part(NamedTuple):
    """A stretch of a file: bytes of a plain file, row groups of a .parquet file.

    Of a .txt file it has the documents that follow a blank line which begins in the stretch (and,
    if it begins at 0, the first), of a .jsonl file the lines that begin in it.
    """

    begin: int
    end: int


WHOLE = Part(0, 1 << 63)


def file_parts(path: str | os.PathLike, part_bytes: int) -> list[Part]:
    """Cut a file into parts of about `part_bytes`; a compressed file is one part.

    Raises:
        UserError: a .parquet file that cannot be read.
    """
    path = Path(path)
    if path.suffix == PARQUET:
        return _row_group_parts(parquet_files.row_group_bytes(path), part_bytes)
    if path.suffix not in FORMATS or not path.is_file():
        return [WHOLE]
    size = path.stat().st_size
    return [Part(begin, min(begin + part_bytes, size)) for begin in range(0, size, part_bytes)]


def _row_group_parts(sizes: list[int], part_bytes: int) -> list[Part]:
    parts, begin, filled = [], 0, 0
    for end, size in enumerate(sizes, 1):
        filled += size
        if filled >= part_bytes or end == len(sizes):
            parts.append(Part(begin, end))
            begin, filled = end, 0
    return parts


def check_text_file(path: Path, field: str) -> None:
    """Find early what reading the file would find late: a missing extra, a missing column.

    Raises:
        UserError: says which.
    """
    if path.suffix == PARQUET:
        parquet_files.check_column(path, field)
    elif path.suffix == ".zst":
        open_zstd(path).close()


def read_paragraphs(
    path: str | os.PathLike, field: str = "text", part: Part = WHOLE
) -> Iterator[Paragraph]:
    """Stream the paragraphs of one file.

    Args:
        path: a file ending in one of `SUFFIXES`.
        field: the field of each .jsonl line, the column of a .parquet file, that holds the text.
        part: which of its documents; made by `file_parts`.

    Raises:
        UserError: an empty file, damaged compression, invalid UTF-8, a .jsonl line that is no JSON
            object or lacks the field, a .parquet file that is damaged, lacks the column or has
            something else than text in it; the message names the file and the line or row.
    """
    path = Path(path)
    if path.suffix == PARQUET:
        texts = parquet_files.read_column(path, field, part.begin, part.end)
        yield from itertools.chain.from_iterable(map(_text_paragraphs, texts))
        return
    with open_binary(path) as stream, reporting_damage(path):
        # One byte ahead: an empty file is a mistake of the user's, found here also when packed.
        if not stream.peek(1):
            raise _empty(path)
        form = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name
        begin = _seek_line(stream, part)
        if begin >= part.end:
            return
        if form.endswith(".jsonl"):
            yield from _read_jsonl(stream, path, field, begin, part.end)
        else:
            yield from _read_text(stream, path, begin, part.end)


@contextlib.contextmanager
def reporting_damage(path: Path) -> Iterator[None]:
    """What a decompressor says of damaged bytes, as a UserError that names the file."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the compressed file is damaged or cut short ({error})") from error


def open_binary(path: Path) -> io.BufferedReader:
    """The bytes of a file, those of a .gz, .xz or .zst file decompressed."""
    # Short lines are read many times faster through one more buffer than by the decompressors.
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return io.BufferedReader(lzma.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(open_zstd(path), 1 << 16)
    return open(path, "rb")


def _empty(path: Path) -> UserError:
    return UserError(f"{path}: the file is empty: remove it or give it some text")


def _seek_line(stream: io.BufferedReader, part: Part) -> int:
    """Go to the first line that begins in the part; its offset, or one that is not in the part."""
    if part.begin == 0:
        return 0
    place = stream.seek(part.begin - 1)
    while place < part.end:
        piece = stream.readline(PARAGRAPH_BYTES)
        place += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return place


def _read_text(stream: io.BufferedReader, path: Path, begin: int, end: int) -> Iterator[Paragraph]:
    inside = starts_document = begin == 0  # until a blank line: another part's document
    for offset, text, whole in _read_lines(stream, path, begin):
        if text and not text.isspace():
            if inside:
                yield Paragraph(text, starts_document)
                starts_document = False
            elif offset >= end:
                return
        elif whole:
            if offset >= end:
                return
            inside = starts_document = True


def _read_lines(
    stream: io.BufferedReader, path: Path, begin: int = 0
) -> Iterator[tuple[int, str, bool]]:
    """Lines as (offset, text, whether this is the whole line), those too long in pieces."""
    line, offset, rest, starts_line = 1, begin, b"", True
    while True:
        raw = rest + stream.readline(PARAGRAPH_BYTES - len(rest))
        if not raw:
            return
        ends_line = raw.endswith(b"\n") or len(raw) < PARAGRAPH_BYTES
        cut = len(raw) if ends_line else _cut_before(raw)
        text = decode(raw[:cut], path, line, offset, begin)
        yield offset, text.rstrip("\r\n"), starts_line and ends_line
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


def decode(raw: bytes, path: Path, line: int, offset: int, begin: int = 0) -> str:
    """A piece of a file as text; UserError names the line.

    Args:
        raw: the piece, which lies at byte `offset` of the file.
        line: that the piece is in, counted from the line at byte `begin` on.
    """
    try:
        # A byte order mark is no part of the text.
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path}: line {_line_number(path, begin, line)} is not valid UTF-8 (byte "
            f"0x{byte:02x} at offset {offset + error.start}): convert the file to UTF-8"
        ) from error


def _line_number(path: Path, begin: int, line: int) -> int:
    """The number in the file of the line that is number `line` from offset `begin` on."""
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(min(1 << 20, begin - file.tell())), b"")
        return line + sum(block.count(b"\n") for block in blocks)


def _read_jsonl(
    stream: io.BufferedReader, path: Path, field: str, begin: int, end: int
) -> Iterator[Paragraph]:
    line, offset = 0, begin
    while offset < end and (raw := stream.readline(JSON_LINE_BYTES)):
        line += 1
        if len(raw) == JSON_LINE_BYTES:
            number = _line_number(path, begin, line)
            raise UserError(f"{path}: line {number} is longer than {JSON_LINE_BYTES} bytes")
        decoded = decode(raw, path, line, offset, begin)
        offset += len(raw)
        if not decoded.isspace():
            try:
                text = _json_field(decoded, field)
            except _JsonError as error:
                number = _line_number(path, begin, line)
                raise UserError(f"{path}: line {number}{error}") from error
            yield from _text_paragraphs(text)


def _text_paragraphs(document: str) -> Iterator[Paragraph]:
    starts_document = True
    for text in document.split("\n"):
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


class _JsonError(Exception):
    """The rest of a sentence that begins with the file and the line."""


def _json_field(decoded: str, field: str) -> str:
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise _JsonError(f" is not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise _JsonError(f": expected a JSON object, found {type(record).__name__}")
    if field not in record:
        names = ", ".join(sorted(record)[:8]) or "none"
        raise _JsonError(
            f" has no field {field!r} (its fields: {names}): name the field that holds the text "
            "with --field"
        )
    text = record[field]
    if not isinstance(text, str):
        raise _JsonError(f": expected text in field {field!r}, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _JsonError(
            f": field {field!r} holds half of a surrogate pair at character {error.start}, which "
            "is no text"
        ) from error
    return text
