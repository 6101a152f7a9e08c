"""One column of text of a Parquet file (needs the package pyarrow, of the extra `data`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metro_ext.errors import UserError

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20  # of a column at a time, instead of a whole row group


def row_group_bytes(path: Path) -> list[int]:
    """The size of each row group, unpacked, in bytes."""
    with _open(path) as file:
        metadata = file.metadata
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def check_column(path: Path, column: str) -> None:
    """See that a file has rows and a column of text.

    Raises:
        UserError: it has not, or cannot be read.
    """
    with _open(path) as file:
        _check(file, path, column)


def read_column(path: Path, column: str, first: int, last: int) -> Iterator[str]:
    """The texts of a column, of row groups `first` to `last` (excluded), in constant memory.

    Raises:
        UserError: no such column, another type, a row without text, a damaged file.
    """
    with _open(path) as file:
        _check(file, path, column)
        metadata = file.metadata
        groups = range(first, min(last, metadata.num_row_groups))
        row = sum(metadata.row_group(i).num_rows for i in range(first))
        batches = file.iter_batches(
            _BATCH_ROWS, row_groups=list(groups), columns=[column], use_threads=False
        )
        for batch in batches:
            for text in batch.column(0).to_pylist():
                if text is None:
                    raise UserError(
                        f"{path}: row {row + 1}: expected text in column {column!r}, found null"
                    )
                yield text
                row += 1


@contextlib.contextmanager
def _open(path: Path) -> Iterator:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading .parquet files needs the package pyarrow: "
            "pip install 'metro-ext[data]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path}: the Parquet file is damaged or none ({error})") from error


def _check(file: Any, path: Path, column: str) -> None:
    import pyarrow

    schema = file.schema_arrow
    if column not in schema.names:
        names = ", ".join(schema.names[:8]) or "none"
        raise UserError(
            f"{path}: there is no column {column!r} (its columns: {names}): name the column that "
            "holds the text with --field"
        )
    found = schema.field(column).type
    if pyarrow.types.is_dictionary(found):
        found = found.value_type
    if not (pyarrow.types.is_string(found) or pyarrow.types.is_large_string(found)):
        raise UserError(f"{path}: expected text in column {column!r}, found {found}")
    if file.metadata.num_rows == 0:
        raise UserError(f"{path}: the file is empty: remove it or give it some text")
