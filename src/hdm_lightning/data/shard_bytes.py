"""Bytes of shards and indices, local or remote: http(s), pipes, and everything that fsspec supports."""

import ipaddress
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from http.client import HTTPMessage, HTTPResponse
from typing import IO, NamedTuple, TypeVar
from urllib.parse import urlsplit

from hdm_lightning.errors import UserError
from hdm_lightning.regular_files import open_regular

T = TypeVar("T")
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")
TRIES = 5
PAUSE_S = 0.5
"""Pause after a first failure, doubled after each further one."""
PART_BYTES = 1 << 20
TIMEOUT_S = 60.0
"""How long a server may be silent."""

SLOWEST_BYTES_PER_S = 20_000
"""Lowest average rate of a reply, so that a server that trickles a few bytes does not block a read forever."""


class Version(NamedTuple):
    """What a server reports about a file."""

    size: int | None
    """Bytes of the whole file, None if not reported."""
    tag: str
    """The ETag, else the time of the last change, else empty."""


SeeVersion = Callable[[Version], None]
"""Called with the version of the file being read; an exception from it stops the read."""


class ReplacedShard(OSError):
    """A file is certainly not the one that was indexed; not retried."""


class RefusedRedirect(OSError):
    """A server redirects to an address that is not allowed; not retried."""


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s), but none from a public address to a private one.

    Requests come from inside the network, so a server outside could use them to reach what it cannot reach itself: the
    router, or a cloud machine's own credentials at 169.254.169.254.
    """

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request that follows the redirect. Raises RefusedRedirect: the new address is not allowed."""
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise RefusedRedirect(f"{req.full_url}: redirects to {newurl}, which is not an http(s) address")
        if is_private(newurl) and not is_private(req.full_url):
            raise RefusedRedirect(f"{req.full_url}: redirects to {newurl}, an address in a private network")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_private(url: str) -> bool:
    """Return whether any IP address of a URL's host belongs to this machine or a private network."""
    return any(not _public(number) for number in numbers_of(urlsplit(url).hostname or ""))


def numbers_of(host: str) -> set[str]:
    """Return the IP addresses of a host; none if the name cannot be resolved here, as behind a proxy."""
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _public(number: str) -> bool:
    address = ipaddress.ip_address(number.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global


def is_local(url: str) -> bool:
    """Return whether an address is a plain path."""
    return "://" not in url and not url.startswith("pipe:")


def read_whole(url: str, most: int) -> bytes:
    """Read a whole file of at most `most` bytes, local or remote; remote reads are retried with growing pauses.

    No more is kept, whatever a server sends. Raises OSError: the file is missing, cannot be read, or is larger.
    """
    large = False
    if is_local(url):
        with open(url, "rb", opener=open_regular) as handle:
            large = os.fstat(handle.fileno()).st_size > most
            data = b"" if large else handle.read(most + 1)
    else:
        data = with_retries(lambda: _remote(url, 0, most + 1))
    if large or len(data) > most:
        raise OSError(f"{url}: has more than {most:,} bytes")
    return data


def read_range(url: str, start: int, end: int, see: SeeVersion | None = None) -> bytes:
    """Read bytes [start, end) of a remote file, fewer if it is shorter; retried with growing pauses.

    `see` is called with the version of the file. Raises OSError: every try failed.
    """
    return with_retries(lambda: _remote(url, start, end, see))


def with_retries(action: Callable[[], T], *, tries: int | None = None) -> T:
    """Call until it succeeds; a missing file, or an error that only the user can fix, is not retried.

    Args:
        action, tries: the function, and how often to call it, with growing pauses; `TRIES` times if None.

    Raises:
        FileNotFoundError, UserError, RefusedRedirect, ReplacedShard: as soon as `action` raises it.
        OSError: every try failed.
    """
    tries, failed = tries or TRIES, 0
    while True:
        try:
            return action()
        except (FileNotFoundError, UserError, RefusedRedirect, ReplacedShard):
            raise
        except Exception as error:  # each kind of store has its own exceptions
            failed += 1
            if failed == tries:
                raise OSError(f"gave up after {tries} tries: {error}") from error
            time.sleep(PAUSE_S * 2 ** (failed - 1))


def _remote(url: str, start: int, end: int | None, see: SeeVersion | None = None) -> bytes:
    if url.startswith(("http://", "https://")):
        return _http(url, start, end, see)
    if url.startswith("pipe:"):
        return _piped(url, start, end)
    import fsspec  # noqa: PLC0415 (slow to load, and needed only here)

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package is missing, or the protocol is unknown
        hint = "check the address; for s3://, gs:// and hf://, pip install 'hdm-lightning[remote]'"
        raise UserError(f"cannot be opened ({error})", where=url, hint=hint) from error
    if see is not None:
        facts = filesystem.info(path)
        tag = next((facts[name] for name in _TAGS if facts.get(name)), "")
        see(Version(facts.get("size"), str(tag)))
    return filesystem.cat_file(path, start=start, end=end)


_TAGS = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime")
"""Names under which fsspec's file systems report the version of a file."""


def _http(url: str, start: int, end: int | None, see: SeeVersion | None) -> bytes:
    """Read bytes [start, end); if a server or proxy sends less than the range, the rest is requested again."""
    data, whole = _http_part(url, start, end, see)
    while data and whole is not None and start + len(data) < (whole if end is None else min(end, whole)):
        part, whole = _http_part(url, start + len(data), end)
        if not part:
            raise ConnectionError(f"{url}: the server sends nothing after byte {start + len(data)}")
        data += part
    return data


def _http_part(url: str, start: int, end: int | None, see: SeeVersion | None = None) -> tuple[bytes, int | None]:
    """Return the bytes of one reply, and the size of the file if a partial reply states it."""
    request = urllib.request.Request(url)
    if start or end is not None:
        request.add_header("Range", f"bytes={start}-{'' if end is None else end - 1}")
    try:
        with _opener().open(request, timeout=TIMEOUT_S) as reply:
            if see is not None:
                see(_version(reply))
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
    """Return the requested bytes of a reply, which may be the range or, without range support, the whole file.

    Raises:
        ConnectionError: the reply has another range, or the connection ended early.
        TimeoutError: the bytes came too slowly.
    """
    begin, whole = start, None
    if reply.status == 206:
        begin, (first, whole) = 0, _content_range(reply)
        if first not in (None, start):
            raise ConnectionError(f"{reply.url}: asked for bytes from {start}, got bytes from {first}")
    wanted = None if end is None else end - start
    if whole is not None:  # a server may send more than the size that it states
        wanted = max(0, whole - start) if wanted is None else max(0, min(whole - start, wanted))
    length = reply.headers.get("Content-Length")
    if length is not None:  # not all servers close the connection after the last byte
        rest = max(0, int(length) - begin)
        wanted = rest if wanted is None else min(rest, wanted)
    read = _hurried(reply)
    _skip(read, begin)
    data = b"".join(_parts(read, wanted))
    if length is not None and len(data) < (wanted or 0):
        raise ConnectionError(f"{reply.url}: got {len(data)} of {wanted} bytes")
    return data, whole


def _version(reply: HTTPResponse) -> Version:
    length = reply.headers.get("Content-Length", "")
    whole = _content_range(reply)[1] if reply.status == 206 else int(length) if length.isdecimal() else None
    return Version(whole, (reply.headers.get("ETag") or reply.headers.get("Last-Modified") or "")[:200])


def _content_range(reply: HTTPResponse) -> tuple[int | None, int | None]:
    """Return the first byte of a partial reply and the size of the whole file, None for what is not stated."""
    found = _RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
    return (None, None) if found is None else (int(found[1]), None if found[2] == "*" else int(found[2]))


def _hurried(reply: HTTPResponse) -> Callable[[int], bytes]:
    """Return a function that reads up to a number of bytes of a reply, and gives up on one that trickles."""
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
    """Yield the next bytes of a stream, `count` or all, fewer if it ends."""
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
