"""Files that are either wholly there or not there at all."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the place of `path` only when the block ends without an exception.

    The bytes go to a temporary name in the same folder, are fsynced and renamed, and the folder is
    fsynced. On any exception (a full disk among them) the temporary file is removed and the old
    file stays as it was.

    Args:
        path: the file to write or replace.
        mode: "wb", or "w" for UTF-8 text.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode must be 'w' or 'wb', found {mode!r}")
    path = Path(path)
    # Opened by open(), not by tempfile, so that the file gets the permissions of the user's umask.
    temporary = temporary_sibling(path)
    try:
        with open(
            temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8"
        ) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name that the caller knows; a failed write has none
        raise
    fsync_folder(path.parent)


def temporary_sibling(path: Path) -> Path:
    """A hidden, unused name in the folder of `path`, so that a rename stays on one file system."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"


def fsync_file(path: str | os.PathLike) -> None:
    """Make a file's content durable: it returns when the disk holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: str | os.PathLike) -> None:
    """Make the names in a folder durable: a rename alone can be lost with the power."""
    fsync_file(folder)


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits, in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
