"""Local copies of remote shards: a folder of bounded size, with each copy checked against its SHA-256 in the index."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hdm_lightning.data.shard_bytes import SeeVersion, read_range, with_retries
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import no_follow

COPIED_BYTES = 32 << 20
"""Bytes of a shard that are fetched at a time."""

STALE_S = 3600


class ShardCache:
    """A folder of whole shards, each checked against its SHA-256; the least recently used are deleted first.

    Every lane reads its own shard, so with a limit below the size of as many shards as there are lanes, copies are
    fetched and deleted with each window.

    Args:
        folder: created if missing.
        limit_gb: maximum total size of the copies, in 10⁹ bytes.

    Raises:
        UserError: the folder cannot be created.
    """

    def __init__(self, folder: str, limit_gb: float) -> None:
        self.folder, self.limit = Path(folder), int(limit_gb * 1e9)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot be created ({error})", where="data.cache_dir", hint="name another one") from error

    def read(self, url: str, size: int, sha256: str, start: int, end: int, see: SeeVersion | None = None) -> bytes:
        """Read bytes [start, end) of a shard of this size and checksum, from its copy if there is room for one.

        Without a copy, `see` is called with the version of the remote file.

        Raises:
            FileNotFoundError, OSError: as for `path` and `read_range`.
        """
        copy = self.path(url, size, sha256)
        if copy is not None:
            try:
                with open(copy, "rb") as handle:
                    handle.seek(start)
                    return handle.read(end - start)
            except FileNotFoundError:
                pass  # another process deleted it in between
        return read_range(url, start, end, see)

    def path(self, url: str, size: int, sha256: str) -> str | None:
        """Return the path of a shard's copy, fetched now if necessary; None if there is no room for one.

        Raises:
            FileNotFoundError: there is no such shard.
            OSError: the shard cannot be fetched, or does not match the index.
        """
        if size > self.limit:
            return None
        copy = self.folder / f"{sha256[:16]}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.tar"
        if not self._touch(copy):
            with _locked(copy.with_suffix(".lock")):
                if not self._touch(copy):
                    temporary = copy.with_suffix(f".part{os.getpid()}")
                    if not self._reserve(temporary, size):
                        return None
                    with_retries(lambda: _fetch(url, size, sha256, temporary, copy), tries=2)
        return str(copy)

    def _touch(self, copy: Path) -> bool:
        try:
            os.utime(copy)
        except FileNotFoundError:
            return False
        return True

    def _reserve(self, temporary: Path, wanted: int) -> bool:
        """Reserve room for a copy with an empty file of its size; False if copies in progress leave too little."""
        with _locked(self.folder / "room.lock"):
            for left, (changed, _) in _states(self.folder.glob("*.part*")).items():
                if time.time() - changed > STALE_S:  # its process was killed
                    left.unlink(missing_ok=True)
            coming = sum(size for _, size in _states(self.folder.glob("*.part*")).values())
            if coming + wanted > self.limit:
                return False
            held = _states(self.folder.glob("*.tar"))
            total = coming + sum(size for _, size in held.values())
            for entry in sorted(held, key=held.__getitem__):
                if total + wanted > self.limit:
                    entry.unlink(missing_ok=True)
                    total -= held[entry][1]
            with open(temporary, "wb", opener=no_follow) as handle:
                handle.truncate(wanted)
            return True


def _states(paths: Iterable[Path]) -> dict[Path, tuple[float, int]]:
    """Return modification time and size of files, without those deleted in the meantime."""
    found = {}
    for path in paths:
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        found[path] = (state.st_mtime, state.st_size)
    return found


def _fetch(url: str, size: int, sha256: str, temporary: Path, copy: Path) -> None:
    digest = hashlib.sha256()
    try:
        with open(temporary, "r+b" if temporary.exists() else "wb", opener=no_follow) as handle:
            for start in range(0, size, COPIED_BYTES):
                part = read_range(url, start, min(start + COPIED_BYTES, size))
                digest.update(part)
                handle.write(part)
        if digest.hexdigest() != sha256:
            raise OSError(f"{url}: wrong checksum")
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w", opener=no_follow) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
