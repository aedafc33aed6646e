"""Commands of the package as a user types them, with what they cost; and a server of shards that counts its bytes."""

import hashlib
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from experiments.study_jobs import TOP


def command(name: str, *words: str) -> subprocess.Popen[str]:
    """Start a command of the package in its own session."""
    print("$", f"hdm-{name}", *words, flush=True)
    return subprocess.Popen(
        [str(Path(sys.executable).with_name(f"hdm-{name}")), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )


def done(name: str, *words: str, may_find: bool = False) -> list[str]:
    """Run a command to its end and return the lines that it printed.

    Raises:
        RuntimeError: its status is not 0, nor 1 if it `may_find` something.
    """
    process = command(name, *words)
    said = process.communicate()[0]
    if process.returncode not in ((0, 1) if may_find else (0,)):
        raise RuntimeError(f"hdm-{name} ended with status {process.returncode}:\n{said[-3000:]}")
    return said.splitlines()


@contextmanager
def measured(into: dict[str, Any], name: str) -> Iterator[None]:
    """Record wall-clock seconds, CPU seconds of commands that ended meanwhile, and those of this process (servers)."""
    begun, own, theirs = time.monotonic(), time.process_time(), _of_children()
    yield
    into[name] = {
        "wall_s": round(time.monotonic() - begun, 1),
        "commands_cpu_s": round(_of_children() - theirs, 1),
        "own_cpu_s": round(time.process_time() - own, 1),
    }


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class ShardServer(ThreadingHTTPServer):
    """Serves a folder over http on loopback, with ranges; three of a hundred replies are an error or break off."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Ranges)
        self.folder, self.lock = folder, threading.Lock()
        self.count: Counter[str] = Counter()
        self.asked: Counter[tuple[str, str | None]] = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Address of the folder."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def trouble(self, path: str, asked: str | None) -> str:
        """Return how to answer; another try of the same range draws again."""
        with self.lock:
            self.asked[path, asked] += 1
            lot = int.from_bytes(hashlib.sha256(f"{path} {asked} {self.asked[path, asked]}".encode()).digest()[:4])
        return {0: "error", 1: "error", 2: "broken off"}.get(lot % 100, "whole")

    def note(self, **counts: int) -> None:
        """Add to the counts of what was served."""
        with self.lock:
            self.count.update(counts)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors from clients that were killed."""


class _Ranges(BaseHTTPRequestHandler):
    server: ShardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        file, asked = self.server.folder / self.path.lstrip("/"), self.headers.get("Range")
        trouble = self.server.trouble(self.path, asked)
        self.server.note(**{"requests": 1, trouble.replace(" ", "_"): 1})
        if trouble == "error":
            return self.send_error(503)
        if not file.is_file():
            return self.send_error(404)
        whole = file.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        begin, end = (int(found[1]), min(whole, int(found[2] or whole) + 1)) if found else (0, whole)
        if begin >= end:
            return self.send_error(416)
        with file.open("rb") as handle:
            handle.seek(begin)
            body = handle.read(end - begin)
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{whole}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.close_connection = trouble == "broken off"
        body = body[: len(body) // 2] if self.close_connection else body
        self.wfile.write(body)
        self.server.note(bytes=len(body))
        return None

    def log_message(self, *arguments: Any) -> None:
        """Log nothing."""
