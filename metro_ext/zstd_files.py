"""Zstandard files as streams (needs the package zstandard, of the extra `data`)."""

import io
from pathlib import Path
from types import ModuleType
from typing import Any

from metro_ext.errors import UserError

_READ_BYTES = 1 << 14  # of compressed bytes at a time: bounds what one read can unfold to
_LONGEST_WINDOW = 1 << 31  # what `zstd --long=31` uses; the library's own limit is 1 << 27


def open_zstd(path: Path) -> io.RawIOBase:
    """A stream of the unpacked bytes; reading a cut file raises EOFError, a damaged one too.

    Raises:
        UserError: zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{path}: reading .zst files needs the package zstandard: pip install 'metro-ext[data]'"
        ) from None
    return _ZstdStream(path, zstandard)


class _ZstdStream(io.RawIOBase):
    """The frames of a file, one after the other.

    zstandard's own reader takes a file that ends within a frame for a whole one.
    """

    def __init__(self, path: Path, zstandard: ModuleType):
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._zstandard = zstandard
        self._frame: Any = None  # the open frame's decompressor
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            if not self._packed:
                self._packed = self._file.read(_READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends before its last frame does")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor(
                max_window_size=_LONGEST_WINDOW
            ).decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()
