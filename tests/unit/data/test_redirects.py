"""Servers that send their readers elsewhere: what is followed, and what is not asked for at all."""

import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hdm_lightning.data import shard_bytes
from hdm_lightning.data.shard_bytes import RefusedRedirect, SafeRedirects, is_private, read_range, read_whole


@pytest.fixture
def servers():
    """Two servers on loopback: the first redirects to `first.target`, the second answers; `paths` are those asked."""

    class First(BaseHTTPRequestHandler):
        def do_GET(self):
            first.paths.append(self.path)
            self.send_response(302)
            self.send_header("Location", first.target)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    class Second(First):
        def do_GET(self):
            second.paths.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

    first, second = (ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (First, Second))
    for server in (first, second):
        server.paths, server.port = [], server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
    first.target = f"http://127.0.0.1:{second.port}/moved"
    yield first, second
    for server in (first, second):
        server.shutdown()
        server.server_close()


def test_a_redirect_within_one_network_is_followed(servers):
    first, second = servers
    assert read_whole(f"http://127.0.0.1:{first.port}/a", 1000) == b"data"
    assert second.paths == ["/moved"]


def test_none_from_outside_leads_into_the_own_network(servers, monkeypatch):
    """The first server under a name of the public net; both are on loopback in truth."""
    first, second = servers
    real = shard_bytes.numbers_of
    monkeypatch.setattr(
        shard_bytes, "numbers_of", lambda host: {"93.184.216.34"} if host == "localhost" else real(host)
    )
    for read in (lambda url: read_whole(url, 1000), lambda url: read_range(url, 0, 4)):
        first.paths.clear()
        with pytest.raises(RefusedRedirect, match="private network"):
            read(f"http://localhost:{first.port}/a")
        assert (first.paths, second.paths) == (["/a"], [])  # and it is asked once


@pytest.mark.parametrize("target", ["ftp://127.0.0.1:{port}/a", "file:///etc/passwd"])
def test_other_protocols_are_not_followed(servers, monkeypatch, target):
    first, second = servers
    monkeypatch.setattr(shard_bytes, "PAUSE_S", 0.0)
    first.target = target.format(port=second.port)
    with pytest.raises(OSError):
        read_whole(f"http://127.0.0.1:{first.port}/a", 1000)
    assert second.paths == []


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("192.168.0.1", True),
        ("169.254.169.254", True),
        ("0.0.0.0", True),
        ("100.64.0.1", True),
        ("[::1]", True),
        ("[fe80::1]", True),
        ("[fd00::1]", True),
        ("[::ffff:10.0.0.1]", True),
        ("93.184.216.34", False),
        ("[2606:2800:220:1::1]", False),
    ],
)
def test_private_addresses(host, private):
    assert is_private(f"http://{host}:8000/a") == private


def test_between_public_addresses_and_outwards_redirects_are_followed():
    for before, after in (("93.184.216.34", "1.1.1.1"), ("10.0.0.1", "1.1.1.1"), ("10.0.0.1", "10.0.0.2")):
        request = urllib.request.Request(f"http://{before}/a")
        request = SafeRedirects().redirect_request(request, None, 302, "Found", {}, f"https://{after}/b")
        assert request.full_url == f"https://{after}/b"
