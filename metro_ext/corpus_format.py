"""What a corpus folder holds, and the reading and writing of its manifest.

manifest.json      what is below, with counts and checksums
tokenizer.model    the tokenizer whose ids the shards hold
documents.bin      where each document starts in the token stream: little-endian uint64
counts.bin         how often each id occurs: little-endian int64 (not in version 1)
shard-00000.bin    the token stream `<s> ... </s> <s> ... </s> ...`, cut into files of equal
shard-00001.bin    length: little-endian uint16, or uint32 for more than 65536 ids
"""

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

from metro_ext.atomic import atomic_write
from metro_ext.errors import UserError

T = TypeVar("T")

FORMAT = "metro-corpus"
VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
DOCUMENTS = "documents.bin"
COUNTS = "counts.bin"
DOCUMENT_DTYPE = "<u8"
TOKEN_DTYPES = {"uint16": "<u2", "uint32": "<u4"}
ITEM_BYTES = {"uint16": 2, "uint32": 4}


def token_dtype_name(vocab_size: int) -> str:
    """The narrower of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.bin"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the token stream."""

    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The figures of a corpus.

    documents, tokens and text_bytes count what is stored: `<s>` and `</s>` are among the tokens,
    text_bytes are the UTF-8 bytes of the paragraphs without line breaks. unigram_entropy_nats is
    the entropy, in nats a token, of the corpus's own distribution over its non-special tokens.
    duplicates are the documents left out because an earlier one has the same text, None if nobody
    looked. Version 1 has no counts_sha256 ("") and no duplicates.
    """

    documents: int
    tokens: int
    text_bytes: int
    dtype: str
    vocab_size: int
    tokenizer_sha256: str
    documents_sha256: str
    unigram_entropy_nats: float
    shards: tuple[Shard, ...]
    counts_sha256: str = ""
    duplicates: int | None = None


def read_fields(kind: type[T], path: Path) -> T | None:
    """A dataclass that was written as JSON; None: the file is not there, or damaged."""
    try:
        found = kind(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    fields = dataclasses.fields(found)  # type: ignore[arg-type]
    return found if all(type(getattr(found, f.name)) is f.type for f in fields) else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, atomically, with a checksum over its own content."""
    body = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    body["sha256"] = _checksum(body)
    with atomic_write(folder / MANIFEST, "w") as file:
        json.dump(body, file, indent=2)
        file.write("\n")


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Read and check manifest.json.

    Raises:
        UserError: the folder is no corpus, the manifest is damaged or of another version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder}: not a corpus, {MANIFEST} is missing: make one with "
            "python -m metro_ext.corpus build"
        )
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not valid JSON ({error}): build the corpus again") from (
            error
        )
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise UserError(f"{path}: not the manifest of a {FORMAT}: build the corpus again")
    if body.get("version") not in READABLE_VERSIONS:
        raise UserError(
            f"{path}: expected format version {VERSION} or older, found "
            f"{body.get('version')!r}: build the corpus again with this version of metro_ext"
        )
    recorded = body.pop("sha256", None)
    if recorded != _checksum(body):
        raise UserError(
            f"{path}: damaged, its checksum does not match its content: build the corpus again"
        )
    try:
        return _manifest(body)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}): build the corpus again") from error


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _manifest(body: dict[str, Any]) -> Manifest:
    """Build the dataclass, letting nothing through that the reader relies on unchecked."""
    values = {k: v for k, v in body.items() if k not in ("format", "version")}
    if body["version"] > 1 and not {"counts_sha256", "duplicates"} <= set(values):
        raise ValueError("counts_sha256 or duplicates is missing")
    shards = tuple(Shard(**shard) for shard in values.pop("shards"))
    manifest = Manifest(**values, shards=shards)
    counts = [
        manifest.documents,
        manifest.tokens,
        manifest.text_bytes,
        manifest.vocab_size,
    ]
    counts += [shard.tokens for shard in shards]
    if not all(type(count) is int and 0 < count < 1 << 63 for count in counts):
        raise ValueError("a count is not a positive whole number of 63 bits")
    if manifest.duplicates is not None and not (
        type(manifest.duplicates) is int and manifest.duplicates >= 0
    ):
        raise ValueError("duplicates is not a whole number")
    if type(manifest.counts_sha256) is not str:
        raise ValueError("counts_sha256 is not text")
    if manifest.dtype != token_dtype_name(manifest.vocab_size):
        raise ValueError(f"dtype {manifest.dtype!r} does not go with {manifest.vocab_size} ids")
    if sum(shard.tokens for shard in shards) != manifest.tokens:
        raise ValueError("the shards' tokens do not add up")
    entropy = manifest.unigram_entropy_nats
    if not (type(entropy) in (int, float) and abs(entropy) <= sys.float_info.max):
        raise ValueError("the unigram entropy is not finite")
    return manifest
