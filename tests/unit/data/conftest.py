"""Small shards of known content, written by the standard library alone, and a server that gives them out."""

import contextlib
import http.server
import io
import json
import re
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from hdm_lightning.data import shard_bytes, source_shards
from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.scanning import index_shards


def letters(text):
    """A tokenizer: one token a letter."""
    return [ord(letter) for letter in text], len(text)


def coloured(number, width=16, height=16, kind="PNG", **options):
    """A picture whose colour tells its number (below 2^16) exactly, encoded without loss by default."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[...] = (number % 256, number // 256, 77)
    return encoded(Image.fromarray(pixels), kind, **options)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, entries, **options):
    """Write (name, bytes) entries with the standard library; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def indexed(path, entries):
    """Write a shard, and the index of its folder, which is returned."""
    write_tar(path, entries)
    return index_shards(path.parent)


def keys_of(samples):
    """Key and weight of each sample."""
    return [(sample.key, sample.weight) for sample in samples]


def reader_of(data):
    """What reads ranges of an archive's bytes."""
    return lambda start, size: data[start : start + size]


def entries_of(first, count, **options):
    """The members of `count` good samples: key, picture, caption and record tell the same number."""
    entries = []
    for number in range(first, first + count):
        entries.append((f"{number:06d}.png", coloured(number, **options)))
        entries.append((f"{number:06d}.txt", f"number {number}".encode()))
        entries.append((f"{number:06d}.json", json.dumps({"number": number}).encode()))
    return entries


def write_shards(folder, counts, **options):
    """Shards 000.tar, 001.tar, … of good samples numbered throughout, with their index."""
    first = 0
    for shard, count in enumerate(counts):
        write_tar(folder / f"{shard:03d}.tar", entries_of(first, count, **options))
        first += count
    index_shards(folder)
    return folder


def write_images(folder, captions):
    """Pictures of the numbers from 0 on, by name without an ending, each with its caption unless that is None."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, caption) in enumerate(captions.items()):
        (folder / f"{name}.png").write_bytes(coloured(number))
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption)
    return folder


def stream_config(*folders, **options):
    """A stream of 16-pixel pictures from folders of shards; bad samples do not stop it by default."""
    defaults = {"resolution": 16, "context_length": 24, "seed": 5, "stage": "s", "lanes": 12, "window": 4}
    defaults["max_bad_share"] = 1.0
    chosen = options.pop("sources", tuple(Source((str(folder),)) for folder in folders))
    return StreamConfig(sources=chosen, **{**defaults, **options})


def data_module(*folders, **options):
    """The data module of the same stream."""
    defaults = {"resolution": 16, "context_length": 24, "seed": 5, "stage": "s", "lanes": 12, "window": 4}
    defaults |= {"max_bad_share": 1.0, "num_workers": 0, "tokenizer": letters, "validation_seed": 5}
    train = [str(folder) for folder in folders]
    return ShardDataModule(train, **{**defaults, **options})


class ShardKit:
    """What tests of this folder share."""

    letters = staticmethod(letters)
    coloured = staticmethod(coloured)
    encoded = staticmethod(encoded)
    write_tar = staticmethod(write_tar)
    indexed = staticmethod(indexed)
    keys_of = staticmethod(keys_of)
    reader_of = staticmethod(reader_of)
    entries_of = staticmethod(entries_of)
    write_shards = staticmethod(write_shards)
    write_images = staticmethod(write_images)
    stream_config = staticmethod(stream_config)
    data_module = staticmethod(data_module)


@pytest.fixture(scope="session")
def kit():
    return ShardKit


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """150 good samples in five uneven shards."""
    return write_shards(tmp_path_factory.mktemp("shards"), [41, 7, 60, 1, 41])


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.folder`; `server.trouble(path, attempt)` names what goes wrong when a range is asked for again."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        with server.lock:
            request = (self.path, self.headers.get("Range"))
            server.requests.append(request)
            attempt = server.requests.count(request)
        trouble = "error" if request == server.unlucky else server.trouble(self.path, attempt)
        file = server.folder / self.path.lstrip("/")
        if trouble == "error":
            return self.send_error(503)
        if not file.is_file() or trouble == "gone":
            return self.send_error(404)
        if trouble == "elsewhere":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/000.tar")
            return self.end_headers()
        body, status = file.read_bytes(), 200
        whole, start = len(body), 0
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found and "no ranges" not in (trouble or ""):
            start, end = int(found[1]), int(found[2] or len(body)) + 1
            if start >= len(body):
                return self.send_error(416)
            body, status = body[start:end], 206
        self.send_response(status)
        if trouble in ("capped", "shifted"):
            start += 512 * (trouble == "shifted")
            body = body[:3000]
        self.tell_version(status, trouble in ("capped", "shifted"), start, len(body), whole)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if "trickle" in (trouble or ""):
            return self.trickle(body)
        self.wfile.write(body[: len(body) // 2] if trouble == "cut" else body)
        if trouble == "stay":
            self.wfile.flush()
            self.server.leave.wait(30)
        if trouble == "cut":
            self.close_connection = True

    def tell_version(self, status, partly, start, size, whole):
        if self.server.tag:
            self.send_header("ETag", self.server.tag)
        if partly or (status == 206 and self.server.tag):
            self.send_header("Content-Range", f"bytes {start}-{start + size - 1}/{whole}")

    def trickle(self, body):
        """Never silent for long, and never done; whoever has heard enough hangs up."""
        with contextlib.suppress(ConnectionError):
            for byte in body[:400]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setattr(shard_bytes, "PAUSE_S", 0.01)
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    instance.folder, instance.requests, instance.lock = shards, [], threading.Lock()
    instance.trouble, instance.unlucky, instance.tag = lambda path, attempt: None, None, None
    instance.daemon_threads, instance.leave = True, threading.Event()
    source_shards.known_shards.cache_clear()  # another server may have had the same port
    instance.url = f"http://127.0.0.1:{instance.server_address[1]}"
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield instance
    instance.leave.set()
    instance.shutdown()
    instance.server_close()
