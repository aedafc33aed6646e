"""Bytes of shards and indices wherever they lie: local files, http(s), pipes, and all that fsspec reaches."""

import errno
import os
import re
import stat
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from http.client import HTTPResponse
from typing import TypeVar

from hdm_lightning.data.redirects import RefusedRedirect, SafeRedirects
from hdm_lightning.errors import UserError

T = TypeVar("T")
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")
OPEN_FILES = 64
TRIES = 5
PAUSE_S = 0.5
PART_BYTES = 1 << 20
TIMEOUT_S = 60.0
"""How long a server may be silent."""

SLOWEST_BYTES_PER_S = 20_000
"""What a reply must come to on average, so that a server that lets a few bytes trickle holds up nobody for ever."""


class LocalFiles:
    """Reads ranges of local files and keeps the last ones open. Threads may share it."""

    def __init__(self, limit: int = OPEN_FILES) -> None:
        self._limit = limit
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, fewer where it is shorter.

        Raises:
            OSError: the file cannot be read.
        """
        with self._lock:
            try:
                return os.pread(self._handle(path), end - start, start)
            except OSError:
                self._forget(path)  # a network file system's handle may be stale: the next read opens anew
                raise

    def close(self) -> None:
        """Close all files."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _handle(self, path: str) -> int:
        handle = self._handles.get(path)
        if handle is None:
            handle = self._handles[path] = _open_file(path)
            if len(self._handles) > self._limit:
                os.close(self._handles.popitem(last=False)[1])
        else:
            self._handles.move_to_end(path)
        return handle

    def _forget(self, path: str) -> None:
        handle = self._handles.pop(path, None)
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.close()


def _open_file(path: str) -> int:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer would hold us up
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return handle


def is_local(url: str) -> bool:
    """Whether an address is a plain path."""
    return "://" not in url and not url.startswith("pipe:")


def read_whole(url: str) -> bytes:
    """A whole file, local or remote; remote ones are tried again with growing pauses.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if is_local(url):
        with open(url, "rb") as handle:
            return handle.read()
    return with_retries(lambda: _remote(url, 0, None))


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a remote file, fewer where it is shorter; tried again with growing pauses.

    Raises:
        OSError: every try failed.
    """
    return with_retries(lambda: _remote(url, start, end))


def with_retries(action: Callable[[], T], *, tries: int | None = None, pause_s: float | None = None) -> T:
    """Call until it works; a missing file, or what only the user can fix, is not tried again.

    Args:
        action: what to try.
        tries: how often, `TRIES` where None.
        pause_s: pause after the first failure, doubled after each, `PAUSE_S` where None.

    Raises:
        FileNotFoundError, UserError, RefusedRedirect: as soon as `action` raises it.
        OSError: every try failed.
    """
    tries, pause_s = tries or TRIES, PAUSE_S if pause_s is None else pause_s
    for attempt in range(tries - 1):
        try:
            return action()
        except (FileNotFoundError, UserError, RefusedRedirect):
            raise
        except Exception:  # each kind of store has exceptions of its own
            time.sleep(pause_s * 2**attempt)
    try:
        return action()
    except (FileNotFoundError, UserError, RefusedRedirect):
        raise
    except Exception as error:
        raise OSError(f"gave up after {tries} tries: {error}") from error


def _remote(url: str, start: int, end: int | None) -> bytes:
    if url.startswith(("http://", "https://")):
        return _http(url, start, end)
    if url.startswith("pipe:"):
        return _piped(url, start, end)
    import fsspec  # noqa: PLC0415 (only such data need it, and it is slow to load)

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package is missing, or nobody knows such addresses
        hint = "check the address; for s3://, gs:// and hf:// pip install 'hdm-lightning[remote]'"
        raise UserError(f"cannot be opened ({error})", where=url, hint=hint) from error
    return filesystem.cat_file(path, start=start, end=end)


def _http(url: str, start: int, end: int | None) -> bytes:
    """Bytes [start, end); what a server or proxy leaves out of a range is asked for again from there on."""
    data, whole = _http_part(url, start, end)
    while data and whole is not None and start + len(data) < (whole if end is None else min(end, whole)):
        part, whole = _http_part(url, start + len(data), end)
        if not part:
            raise ConnectionError(f"{url}: the server gives nothing after byte {start + len(data)}")
        data += part
    return data


def _http_part(url: str, start: int, end: int | None) -> tuple[bytes, int | None]:
    """The bytes of one reply, and the size of the file where the reply is a range and says so."""
    request = urllib.request.Request(url)
    if start or end is not None:
        request.add_header("Range", f"bytes={start}-{'' if end is None else end - 1}")
    try:
        with _opener().open(request, timeout=TIMEOUT_S) as reply:
            return _body(reply, start, end)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"{url}: HTTP {error.code}") from error
        if error.code == 416:  # the file ends before the range begins
            return b"", None
        raise


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(SafeRedirects)


def _body(reply: HTTPResponse, start: int, end: int | None) -> tuple[bytes, int | None]:
    """The wanted bytes of a reply, which may be the range or, from a plain server, the whole file.

    Raises:
        ConnectionError: another range came, or the connection ended before the bytes did.
        TimeoutError: they came too slowly.
    """
    begin, whole = start, None
    if reply.status == 206:
        begin, (first, whole) = 0, _content_range(reply)
        if first not in (None, start):
            raise ConnectionError(f"{reply.url}: bytes from {first} on came for those from {start} on")
    wanted = None if end is None else end - start
    length = reply.headers.get("Content-Length")
    if length is not None:  # not all servers hang up after the last byte
        rest = max(0, int(length) - begin)
        wanted = rest if wanted is None else min(rest, wanted)
    read = _hurried(reply)
    _skip(read, begin)
    data = b"".join(_parts(read, wanted))
    if length is not None and len(data) < (wanted or 0):
        raise ConnectionError(f"{reply.url}: {len(data)} of {wanted} bytes came")
    return data, whole


def _content_range(reply: HTTPResponse) -> tuple[int | None, int | None]:
    """First byte of a partial reply and size of the whole file, None for what it does not say."""
    found = _RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
    return (None, None) if found is None else (int(found[1]), None if found[2] == "*" else int(found[2]))


def _hurried(reply: HTTPResponse) -> Callable[[int], bytes]:
    """Reads what has come of a reply, up to a number of bytes, and gives up on one that trickles."""
    begin, came = time.monotonic(), 0

    def read(count: int) -> bytes:
        nonlocal came
        data = reply.read1(count)
        came += len(data)
        if time.monotonic() - begin > TIMEOUT_S + came / SLOWEST_BYTES_PER_S:
            raise TimeoutError(f"{reply.url}: only {came} bytes in {time.monotonic() - begin:.0f} s")
        return data

    return read


def _parts(read: Callable[[int], bytes], count: int | None) -> Iterator[bytes]:
    """The next bytes of a stream, `count` or all, fewer where it ends."""
    while count is None or count > 0:
        data = read(PART_BYTES if count is None else min(count, PART_BYTES))
        if not data:
            return
        yield data
        count = None if count is None else count - len(data)


def _piped(url: str, start: int, end: int | None) -> bytes:
    from webdataset import gopen  # noqa: PLC0415 (webdataset is slow to load)

    with gopen(url, "rb") as stream:
        _skip(stream.read, start)
        return stream.read() if end is None else stream.read(end - start)


def _skip(read: Callable[[int], bytes], count: int) -> None:
    for _ in _parts(read, count):
        pass
