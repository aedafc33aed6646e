"""A web of addresses for img2dataset, made from the drawings of this repository, with the usual faults of the web.

The answer of an address depends only on its number: a drawing, mirrored or not, on a page of its own color and size,
in one of the forms that images have on the web; or one of the ways in which addresses are dead.
"""

import io
import tarfile
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hdm_lightning.data.index import load_index

DEAD = {"404": 0.105, "403": 0.025, "500": 0.015, "cut_off": 0.01, "opted_out": 0.008, "page": 0.012}
"""Shares of addresses without an image: errors, broken connections, `noai` in the reply, a page with status 200."""

FORMS = {
    "gray": 0.02,
    "png": 0.05,
    "webp": 0.03,
    "turned": 0.01,
    "cmyk": 0.005,
    "banner": 0.01,
    "dot": 0.004,
    "half": 0.003,
}
"""Shares of forms other than plain JPEG: `turned` only by EXIF, `dot` is 1 px large, `half` is a truncated JPEG."""

NO_TEXT = 0.003
"""Share of addresses whose alt text is empty."""

ENDINGS = ("", ", clipart", " (public domain)")
SIDES_PX = (40, 192)
PAGE = b"<!DOCTYPE html><html><head><title>Not found</title></head><body>Gone fishing.</body></html>"


@dataclass(frozen=True)
class Address:
    """What is known of an address before it is requested, and how it will answer."""

    number: int
    answer: str
    """A key of `DEAD` or `FORMS`, or `jpeg`."""
    drawing: int
    text: str | None
    scores: dict[str, float]
    """Columns that COYO-700M provides."""


class Web:
    """All addresses.

    Args:
        folder: shards of the drawings.
        seed: another seed makes another web.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.drawn, self.seed = drawings(folder), seed

    def address(self, number: int) -> Address:
        """Return the address of a number."""
        random = np.random.default_rng((self.seed, number, 0))
        drawing = int(random.integers(len(self.drawn)))
        shares = DEAD | FORMS
        answer = str(random.choice([*shares, "jpeg"], p=[*shares.values(), 1 - sum(shares.values())]))
        text = None if random.random() < NO_TEXT else self.drawn[drawing][1] + str(random.choice(ENDINGS))
        scores = {
            "clip_similarity_vitb32": float(random.normal(0.3, 0.04)),
            "watermark_score": float(random.beta(1, 4)),
            "aesthetic_score_laion_v2": float(random.normal(5, 0.7)),
        }
        return Address(number, answer, drawing, text, scores)

    def image(self, address: Address) -> bytes:
        """Return the image file that the server has for an address."""
        random = np.random.default_rng((self.seed, address.number, 1))
        picture = self.drawn[address.drawing][0].copy()
        side = int(random.integers(*SIDES_PX, endpoint=True))
        picture.thumbnail((side, side))
        if random.random() < 0.5:
            picture = ImageOps.mirror(picture)
        return encoded(picture, address.answer, tuple(random.integers(180, 256, 3).tolist()))


def drawings(folder: Path) -> list[tuple[Image.Image, str]]:
    """Return the drawings with their captions."""
    found = []
    for record in load_index(folder).shards:
        with tarfile.open(folder / record.name) as archive:
            parts = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
        for name, content in parts.items():
            if name.endswith(".webp"):
                text = parts[f"{name.removesuffix('.webp')}.txt"].decode()
                found.append((Image.open(io.BytesIO(content)).convert("RGB"), text))
    return found


def encoded(picture: Image.Image, form: str, color: tuple[int, int, int]) -> bytes:
    """Encode a drawing on a page of a color, in one of the forms of the web."""
    file = io.BytesIO()
    if form == "png":  # white is transparent
        alpha = ImageOps.invert(picture.convert("L")).point(lambda value: min(255, 4 * value))
        picture.putalpha(alpha)
        picture.save(file, "PNG", compress_level=1)
        return file.getvalue()
    page = Image.fromarray((np.asarray(picture, np.uint16) * color // 255).astype(np.uint8))
    if form == "banner":
        page = page.resize((160, 32))
    if form == "dot":
        page = page.resize((1, 1))
    if form in ("gray", "cmyk"):
        page = page.convert("L" if form == "gray" else "CMYK")
    exif = Image.Exif()
    if form == "turned":
        exif[0x0112] = 6
    page.save(file, "WEBP" if form == "webp" else "JPEG", quality=88, exif=exif)
    content = file.getvalue()
    return content[: len(content) * 2 // 3] if form == "half" else content


class WebServer(ThreadingHTTPServer):
    """Serves the addresses over http on loopback: `/NUMBER.jpg`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, web: Web) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.web = web
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, number: int) -> str:
        """Return the URL of a number."""
        return f"http://127.0.0.1:{self.server_address[1]}/{number}.jpg"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors from clients that were killed."""


class _Answer(BaseHTTPRequestHandler):
    server: WebServer

    def do_GET(self) -> None:
        address = self.server.web.address(int(self.path.strip("/").partition(".")[0]))
        if address.answer.isdigit():
            return self.send_error(int(address.answer))
        if address.answer == "cut_off":
            return self.connection.close()
        page = address.answer == "page"
        body = PAGE if page else self.server.web.image(address) if address.answer != "opted_out" else b"-"
        self.send_response(200)
        if address.answer == "opted_out":
            self.send_header("X-Robots-Tag", "noai")
        self.send_header("Content-Type", "text/html" if page else "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, *arguments: Any) -> None:
        """Log nothing."""
