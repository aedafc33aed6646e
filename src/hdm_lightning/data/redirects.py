"""Where a server of shards may send its readers: to http(s) addresses, and not from outside into the own network."""

import ipaddress
import socket
import urllib.request
from http.client import HTTPMessage
from typing import IO
from urllib.parse import urlsplit


class RefusedRedirect(OSError):
    """A server sends its readers where they do not go; asking again would not help."""


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s), but none from a public address to a private one.

    The request comes from inside the network, so a server outside could have it ask what it cannot reach itself: the
    router, or a cloud machine's own credentials at 169.254.169.254.
    """

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """The request to make next.

        Raises:
            RefusedRedirect: it would go elsewhere.
        """
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise RefusedRedirect(f"{req.full_url}: redirects to {newurl}, which is no http(s) address")
        if is_private(newurl) and not is_private(req.full_url):
            raise RefusedRedirect(f"{req.full_url}: redirects to {newurl}, an address of the private network")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_private(url: str) -> bool:
    """Whether an address leads to this machine or its own network by any of the numbers that its name stands for."""
    return any(not _public(number) for number in numbers_of(urlsplit(url).hostname or ""))


def numbers_of(host: str) -> set[str]:
    """The IP addresses of a host; none where the name is unknown here, as behind a proxy."""
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _public(number: str) -> bool:
    address = ipaddress.ip_address(number.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global
