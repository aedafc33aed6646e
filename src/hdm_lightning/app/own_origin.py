"""Accept only requests by the page's own scripts, under its own names, and let it load nothing from elsewhere."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

Scope = Mapping[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]

HEADERS = {
    "content-security-policy": "; ".join(
        [
            "default-src 'self'",
            "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self' data: blob:",
            "worker-src 'self' blob:",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}


class OwnOrigin:
    """ASGI middleware that refuses requests from other pages, and lets the page load only from this server.

    Any page open in a browser can send requests to a local server; its `Origin` gives it away. A page whose name is
    pointed at this machine after it was loaded (DNS rebinding) sends its own name as `Host`.

    Args:
        app: the application.
        hosts: names of a page on the loopback address; empty allows all, for a page that listens elsewhere.
    """

    def __init__(self, app: Any, hosts: Collection[str] = ()) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if not self.allows(_headers(scope)):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not from this page"})
            return

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self.app(scope, receive, with_headers)

    def allows(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request with these headers comes from the page itself, or from no page."""
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            named = urlsplit(f"//{host}").hostname or ""
            same = origin is None or urlsplit(origin).netloc == host
        except ValueError:  # an unmatched bracket, which no browser sends
            return False
        return same and (not self.hosts or named in self.hosts)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
