"""Duplicate documents of a build, found by sorting their hashes outside of memory.

The hashes are dealt to files by their first bits, so that equal ones meet in one file and each
file fits in memory; in it they are sorted by (hash, place in the corpus), and of those that are
equal all but the first are dropped. On disk that takes 24 bytes a document, in memory one bit a
document and about 100 MB. The outcome does not depend on how the work is shared out.
"""

from pathlib import Path

import numpy as np

from metro_ext.atomic import atomic_write
from metro_ext.corpus_parts import documents_of, part_path, read_record

_FILE_DOCUMENTS = 1 << 20  # to a file, on average
_ENTRY = np.dtype([("hash", "<u8", 2), ("place", "<u8")])
_BITS_AT_ONCE = 1 << 20


def mark_duplicates(parts: Path, units: int) -> None:
    """Write the `dropped` file of each unit that has a document which an earlier one equals.

    Args:
        parts: the folder of the units' files, made with hashes.
        units: how many there are.
    """
    for unit in range(units):
        part_path(parts, unit, "dropped").unlink(missing_ok=True)
    documents = [read_record(parts, unit).documents for unit in range(units)]
    files = _deal(parts, units, -(-sum(documents) // _FILE_DOCUMENTS))
    dropped = np.zeros(-(-sum(documents) // 8), np.uint8)  # a bit for each
    for path in files:
        places = _later_ones(np.fromfile(path, _ENTRY))
        np.bitwise_or.at(dropped, places >> 3, np.uint8(1) << (places & 7).astype(np.uint8))
        path.unlink()
    first = 0
    for unit, count in enumerate(documents):
        _write_dropped(part_path(parts, unit, "dropped"), dropped, first, count)
        first += count


def _deal(parts: Path, units: int, count: int) -> list[Path]:
    """All documents' hashes, in `count` files by the hash."""
    files = [parts / f"hashes-{i:05d}" for i in range(count)]
    for path in files:
        path.write_bytes(b"")
    place = 0
    for unit in range(units):
        for records, _ in documents_of(parts, unit):
            entries = np.empty(records.size, _ENTRY)
            entries["hash"] = np.frombuffer(records["hash"].tobytes(), "<u8").reshape(-1, 2)
            entries["place"] = np.arange(place, place + records.size)
            place += records.size
            # The first 32 bits, as a share of 2^32, choose the file.
            chosen = (entries["hash"][:, 0] >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)
            order = np.argsort(chosen, kind="stable")
            borders = np.searchsorted(chosen[order], np.arange(count + 1))
            for i in np.flatnonzero(np.diff(borders)):
                with open(files[i], "ab") as file:
                    file.write(entries[order[borders[i] : borders[i + 1]]].data)
    return files


def _later_ones(entries: np.ndarray) -> np.ndarray:
    """Places, int64, of the entries whose hash an entry of a smaller place has."""
    order = np.lexsort((entries["place"], entries["hash"][:, 1], entries["hash"][:, 0]))
    hashes = entries["hash"][order]
    same = (hashes[1:] == hashes[:-1]).all(axis=1)
    return entries["place"][order[1:][same]].astype(np.int64)


def _write_dropped(path: Path, dropped: np.ndarray, first: int, count: int) -> None:
    """Bits `first` to `first + count` as bytes, unless all are 0."""
    if not dropped[first // 8 : -(-(first + count) // 8)].any():
        return
    with atomic_write(path) as file:
        for begin in range(first, first + count, _BITS_AT_ONCE):
            end = min(begin + _BITS_AT_ONCE, first + count)
            bits = np.unpackbits(dropped[begin // 8 : -(-end // 8)], bitorder="little")
            file.write(bits[begin % 8 :][: end - begin])
