"""Columns of an index (one number per sample): how they are packed, and the separate file for those of a large index.

That file is stored next to the index and mapped into memory, not read: a process uses memory only for the pages that
it accesses, which all processes of a machine share.
"""

import hashlib
import mmap
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.shard_bytes import is_local, read_range
from hdm_lightning.regular_files import open_regular
from hdm_lightning.whole_files import write_atomically

Integers = NDArray[np.int64]
Packed = bytes | memoryview
"""A column of numbers as `pack` wrote it."""

SUFFIX = ".columns"
FETCHED_BYTES = 64 << 20
_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_NAME = re.compile(rf"{_STEM.pattern}-[0-9a-f]{{12}}\.columns")


def pack(column: Sequence[int] | Integers) -> bytes:
    """Pack a column of numbers in [0, 2^62): all lowest bytes, then all second ones, and so on, deflated."""
    numbers = np.asarray(column, dtype="<u8")
    most = int(numbers.max()) if len(numbers) else 0
    width = 2 if most < 1 << 16 else 4 if most < 1 << 32 else 8
    planes = numbers.astype(f"<u{width}").view(np.uint8).reshape(-1, width).T
    return zlib.compress(planes.tobytes(), 6)


def unpack(packed: Packed, count: int) -> Integers:
    """Return the column of `count` numbers that `pack` wrote. Raises ValueError: it is not such a column."""
    try:  # with a limit, because a small file can unpack to gigabytes
        raw = np.frombuffer(zlib.decompressobj().decompress(packed, 8 * count + 1), dtype=np.uint8)
    except zlib.error as error:
        raise ValueError(f"a column cannot be unpacked ({error})") from error
    width = len(raw) // count if count else 2
    if len(raw) != width * count or width not in (2, 4, 8):
        raise ValueError("a column does not have one entry per sample")
    bytewise = np.empty((count, width), dtype=np.uint8)
    for place, plane in enumerate(raw.reshape(width, count)):
        bytewise[:, place] = plane
    numbers = bytewise.view(f"<u{width}")[:, 0]
    if width == 8 and numbers.max() >> 62:
        raise ValueError("a column contains a number that is too large")
    return numbers.astype(np.int64)


def write_columns(columns: Callable[[], Iterable[Packed]], index: Path) -> str:
    """Write columns one after another into a file beside an index, and return its name, which has their hash.

    So an index never gets the columns of another one: a reader of the old index still finds the old file. A file that
    already has these columns is kept: leaving out a sample changes none of its millions of numbers. `columns` is called
    more than once.
    """
    digest, size, mapped = hashlib.sha256(), 0, True
    for column in columns():
        digest.update(column)
        size += len(column)
        mapped = mapped and _is_mapped(column)
    file = index.with_name(f"{_stem(index)}-{digest.hexdigest()[:12]}{SUFFIX}")

    def write(handle: IO[bytes]) -> None:
        handle.writelines(columns())

    # If all columns are mapped, they were just hashed from that very file; otherwise it may have been damaged since.
    intact = file.is_file() and file.stat().st_size == size if mapped else _holds(file, digest.hexdigest())
    if not intact:
        write_atomically(file, write)
    return file.name


def _is_mapped(column: Packed) -> bool:
    return isinstance(column, memoryview) and isinstance(column.obj, mmap.mmap)


def _holds(file: Path, sha256: str) -> bool:
    try:
        with open(file, "rb", opener=open_regular) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest() == sha256
    except OSError:
        return False


def remove_other_columns(index: Path, kept: str | None) -> None:
    """Delete the columns files of earlier versions of an index."""
    for other in index.parent.glob(f"{_stem(index)}-????????????{SUFFIX}"):
        if other.name != kept:
            other.unlink(missing_ok=True)


def _stem(index: Path) -> str:
    """Return the stem of an index's columns files: its own, or a hash if that has special characters."""
    name = index.stem
    return name if _STEM.fullmatch(name) else hashlib.sha256(os.fsencode(name)).hexdigest()[:12]


def map_columns(index: str, name: object, size: int) -> memoryview:
    """Map the columns file beside an index, read-only; a remote one is copied to an unnamed local file.

    Args:
        index: path or address of the index.
        name, size: name of the columns file and its size in bytes, according to the index.

    Raises:
        OSError: the file does not exist, or has another size.
        ValueError: the name is not that of a columns file.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a columns file")
    folder = index.rpartition("/")[0]
    place = f"{folder}/{name}" if folder else name
    if is_local(place):
        with open(place, "rb", opener=open_regular) as handle:
            return _mapped(handle.fileno(), size, place)
    with tempfile.TemporaryFile(prefix="hdm-index-") as handle:
        while handle.tell() < size:
            part = read_range(place, handle.tell(), min(size, handle.tell() + FETCHED_BYTES))
            if not part:
                break
            handle.write(part)
        handle.flush()
        return _mapped(handle.fileno(), size, place)


def let_go(column: Packed) -> None:
    """Release this process's pages of the mapped file that a column is in; the next access maps them again."""
    if isinstance(column, memoryview) and isinstance(column.obj, mmap.mmap):
        column.obj.madvise(mmap.MADV_DONTNEED)


def _mapped(descriptor: int, size: int, place: str) -> memoryview:
    found = os.fstat(descriptor).st_size
    if found != size:
        raise OSError(f"{place} has {found:,} bytes, the index says {size:,}")
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
