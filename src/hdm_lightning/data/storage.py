"""Bytes of shards and indices wherever they lie: local files, http(s), and all that fsspec reaches."""

import os
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_OPEN_FILES = 64
_TRIES = 5
_TIMEOUT_S = 60.0


class LocalFiles:
    """Reads ranges of local files and keeps the last ones open."""

    def __init__(self, limit: int = _OPEN_FILES) -> None:
        self._limit = limit
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._owner = os.getpid()

    def read(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, fewer where it is shorter.

        Raises:
            OSError: the file cannot be read.
        """
        return os.pread(self._handle(path), end - start, start)

    def close(self) -> None:
        """Close all files."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _handle(self, path: str) -> int:
        handle = self._handles.get(path)
        if handle is None:
            handle = self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._handles) > self._limit:
                os.close(self._handles.popitem(last=False)[1])
        else:
            self._handles.move_to_end(path)
        return handle

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return LocalFiles, (self._limit,)


def is_local(url: str) -> bool:
    """Whether an address is a plain path."""
    return "://" not in url and not url.startswith("pipe:")


def read_whole(url: str) -> bytes:
    """A whole file, local or remote.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if is_local(url):
        with open(url, "rb") as handle:
            return handle.read()
    return with_retries(lambda: _remote(url, 0, None))


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a remote file, retried with growing pauses.

    Raises:
        OSError: every try failed.
    """
    return with_retries(lambda: _remote(url, start, end))


def with_retries(action: Callable[[], T], *, tries: int = _TRIES, pause_s: float = 0.5) -> T:
    """Call until it works; a missing file is not tried again."""
    for attempt in range(tries):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:
            if attempt == tries - 1:
                raise OSError(f"gave up after {tries} tries: {error}") from error
            time.sleep(pause_s * 2**attempt)
    raise ValueError(f"tries must be at least 1, got {tries}")


def _remote(url: str, start: int, end: int | None) -> bytes:
    if url.startswith(("http://", "https://")):
        return _http(url, start, end)
    if url.startswith("pipe:"):
        return _piped(url, start, end)
    import fsspec  # noqa: PLC0415 (only remote data needs it, and it is slow to load)

    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.cat_file(path, start=start, end=end)


def _http(url: str, start: int, end: int | None) -> bytes:
    headers = {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as reply:
            if headers and reply.status != 206:
                _skip(reply.read, start)
            wanted = -1 if end is None else end - start
            data = reply.read(wanted)
            length = reply.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"{url}: HTTP {error.code}") from error
        raise
    expected = None if length is None else int(length) - (start if headers and reply.status != 206 else 0)
    if expected is not None and len(data) < (expected if end is None else min(expected, end - start)):
        raise ConnectionError(f"{url}: the reply ended early")
    return data


def _piped(url: str, start: int, end: int | None) -> bytes:
    from webdataset.gopen import gopen  # noqa: PLC0415 (webdataset loads torch)

    with gopen(url, "rb") as stream:
        _skip(stream.read, start)
        return stream.read() if end is None else stream.read(end - start)


def _skip(read: Callable[[int], bytes], count: int) -> None:
    while count > 0:
        data = read(min(count, 1 << 20))
        if not data:
            return
        count -= len(data)
