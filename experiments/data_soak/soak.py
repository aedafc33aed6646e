"""Two ranks with two workers each, killed again and again, over broken shards behind an unreliable server.

At the end every good sample must have been seen exactly as often as planned, every bad one must have left a hole, and
nothing may have hung. Usage: python experiments/data_soak/soak.py --minutes 30 --out experiments/data_soak
"""

import argparse
import faulthandler
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import signal
import tarfile
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from hdm_lightning.data import shard_bytes
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.index import load_index
from hdm_lightning.data.loader import StreamLoader
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.scanning import index_shards

WORLD, WORKERS, BATCH = 2, 2, 8
SAMPLES = (211, 97, 160, 3, 344, 129)
LONGEST_SILENCE_S = 600
TROUBLE_S, WELL_S = 0.3, 10.0
"""With the pauses set here, the first and last try of a read are 0.75 s apart."""


class Server(http.server.ThreadingHTTPServer):
    """A server that does not report errors from killed clients."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        """Log nothing."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ranges of bytes; each can fail for a moment after its first request, then works for a while.

    So a client that retries as `shard_bytes` does never fails on every try, however many ask at once.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Serve a range, or a fault: an error, a truncated reply, or a slow one."""
        asked, now = (self.path, self.headers.get("Range")), time.monotonic()
        with self.server.lock:
            count, since = self.server.asked.get(asked, (0, -WELL_S))
            since = now if now - since >= WELL_S else since
            self.server.asked[asked] = count + 1, since
        lot = hashlib.sha256(f"{asked} {count}".encode()).digest()
        well = now - since >= TROUBLE_S or lot[0] >= 128
        trouble = "none" if well else ("error", "cut", "slow")[lot[1] % 3]
        self.server.troubles[trouble] += 1
        file = self.server.folder / self.path.lstrip("/")
        if trouble == "error":
            return self.send_error(503)
        if not file.is_file():
            return self.send_error(404)
        if trouble == "slow":
            time.sleep(0.3)
        body, status = file.read_bytes(), 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked[1] or "")
        if found:
            body, status = body[int(found[1]) : int(found[2] or len(body)) + 1], 206
            if not body:
                return self.send_error(416)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if trouble == "cut" else body)
        self.close_connection = trouble == "cut"
        return None

    def log_message(self, *arguments):
        """Log nothing."""


def write_shards(folder: Path) -> None:
    """Write good samples of known number in shards of different sizes."""
    number = 0
    for shard, count in enumerate(SAMPLES):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for _ in range(count):
                add_sample(archive, number)
                number += 1


def add_sample(archive: tarfile.TarFile, number: int) -> None:
    """Add a JPEG of varying shape and a caption."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    size = (int(rng.integers(64, 200)), int(rng.integers(64, 200)))
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    for name, data in ((f"{number:06d}.jpg", buffer.getvalue()), (f"{number:06d}.txt", b"caption %d" % number)):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def break_shards(folder: Path) -> set[str]:
    """Damage shards after they were indexed; return the keys of the samples whose bytes were touched."""
    touched = set()
    index = load_index(folder)
    for record in index.shards:
        path = folder / record.name
        data, rng = bytearray(path.read_bytes()), random.Random(record.name)
        table = record.table()
        hit = np.zeros(len(data), bool)
        if record.name == "001.tar":
            hit[len(data) // 2 :] = True
            del data[len(data) // 2 :]
        elif record.name == "003.tar":
            hit[:] = True
        for _ in range(4 if record.name in ("002.tar", "004.tar") else 0):
            begin = rng.randrange(len(data))
            data[begin : begin + 700] = bytes(min(700, len(data) - begin))
            hit[begin : begin + 700] = True
        first = sum(SAMPLES[: int(record.name[:3])])
        for ordinal, start, size in zip(table.ordinal, table.start, table.size, strict=True):
            if hit[start : start + size].any():
                touched.add(f"{record.name}/{first + int(ordinal):06d}")
        path.write_bytes(data)
        if record.name == "003.tar":
            path.unlink()
    return touched


def rank_loop(rank: int, config: StreamConfig, folder: Path, stop: int) -> None:
    """Consume samples until `stop`; each rank logs what it saw and saves its position."""
    faulthandler.register(signal.SIGUSR1)
    shard_bytes.PAUSE_S = 0.05
    state = folder / f"consumed-{rank}.json"
    done = json.loads(state.read_text()) if state.exists() else 0
    loader = StreamLoader(config, Plan(config), _tokenize, batch_size=BATCH, rank=rank, world=WORLD, start=done)
    with (folder / f"log-{rank}.jsonl").open("a") as log:
        log.write("\n")  # a kill may have left half a line
        for batch in loader:
            done += BATCH * WORLD
            rows = zip(batch["index"].tolist(), batch["keys"], batch["weight"].tolist(), strict=True)
            log.write(json.dumps([done, list(rows)]) + "\n")
            log.flush()
            temporary = state.with_suffix(".new")
            temporary.write_text(json.dumps(done))
            os.replace(temporary, state)
            if done >= stop:
                return


def _tokenize(caption: str) -> tuple[list[int], int]:
    return [1] * len(caption.split()), len(caption.split())


def run(minutes: float, folder: Path, shards: Path, url: str) -> dict[str, object]:
    """Kill the ranks at random until the time is up, then let them run to a common end."""
    config = StreamConfig(
        sources=(Source((url,)),),
        resolution=64,
        context_length=16,
        stage="soak",
        crop=CropRules(max_aspect=8.0),
        lanes=24,
        window=8,
        workers=WORKERS,
        max_bad_share=0.9,
        quarantine=str(folder / "quarantine.jsonl"),
    )
    context, rng, kills = multiprocessing.get_context("fork"), random.Random(0), 0
    deadline, stop = time.monotonic() + 60 * minutes, 10**9
    while True:
        ranks = [context.Process(target=rank_loop, args=(rank, config, folder, stop)) for rank in range(WORLD)]
        for rank, process in enumerate(ranks):
            (folder / f"log-{rank}.jsonl").touch()
            process.start()
        last = stop < 10**9
        until = time.monotonic() + (10**9 if last else min(rng.uniform(20, 90), deadline - time.monotonic()))
        watch(ranks, folder, until)
        if last:
            break
        kills += 1
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if time.monotonic() >= deadline:
            stop = max(json.loads(path.read_text()) for path in folder.glob("consumed-*.json")) + 4 * BATCH * WORLD
    return {"kills": kills, "samples": stop, **check(config, folder, shards, stop)}


def watch(ranks: list[multiprocessing.Process], folder: Path, until: float) -> None:
    """Wait until a time or until all ranks have ended; a rank that is silent for long counts as hung."""
    while time.monotonic() < until and any(process.is_alive() for process in ranks):
        time.sleep(0.5)
        for rank, process in enumerate(ranks):
            log = folder / f"log-{rank}.jsonl"
            if process.is_alive() and log.exists() and time.time() - log.stat().st_mtime > LONGEST_SILENCE_S:
                os.kill(process.pid, signal.SIGUSR1)  # prints its stack
                time.sleep(5)
                raise SystemExit(f"rank {rank} hangs")
            if process.exitcode not in (None, 0):
                raise SystemExit(f"rank {rank} ended with {process.exitcode}")


def check(config: StreamConfig, folder: Path, shards: Path, stop: int) -> dict[str, object]:
    """Compare what was seen with the plan, sample by sample."""
    seen: dict[int, tuple[str, float]] = {}
    for rank in range(WORLD):
        for line in (folder / f"log-{rank}.jsonl").read_text().splitlines():
            for index, key, weight in _rows(line):
                # A batch that was logged before a kill, but not marked as done, comes again: it must be the same.
                if seen.setdefault(index, (key, weight)) != (key, weight):
                    raise SystemExit(f"position {index} changed: {seen[index]} and {(key, weight)}")
    if sorted(seen) != list(range(stop)):
        raise SystemExit("positions are missing")
    plan, touched = Plan(config), json.loads((folder / "touched.json").read_text())
    planned, found, holes = Counter[str](), Counter[str](), 0
    for index in range(stop):
        place = plan.locate(index)
        record = plan.parts[place.part].shards[place.shard].record
        ordinal = int(record.table().ordinal[place.rank]) if index < plan.samples else place.rank
        key = f"{record.name}/{sum(SAMPLES[: int(record.name[:3])]) + ordinal:06d}"
        if key not in touched:
            planned[key] += 1
            found[key] += seen[index] == (key, 1.0)
        else:
            holes += seen[index][1] == 0.0
    if planned != found:
        raise SystemExit(f"{sum(planned.values()) - sum(found.values())} good samples were not seen as planned")
    return {"good samples": len(planned), "passes": round(stop / plan.samples, 2), "holes": holes}


def _rows(line: str) -> list[tuple[int, str, float]]:
    try:
        return json.loads(line)[1]
    except ValueError:
        return []  # empty, or cut by a kill before its batch was marked


def main() -> None:
    """Set up, run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, help="folder for result.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        shards, folder = Path(temporary) / "shards", Path(temporary) / "run"
        shards.mkdir()
        folder.mkdir()
        write_shards(shards)
        index_shards(shards)
        (folder / "touched.json").write_text(json.dumps(sorted(break_shards(shards))))
        server = Server(("127.0.0.1", 0), Handler)
        server.folder, server.lock = shards, threading.Lock()
        server.asked, server.troubles = {}, Counter()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        begin = time.monotonic()
        result = run(arguments.minutes, folder, shards, f"http://127.0.0.1:{server.server_address[1]}")
        result |= {"minutes": round((time.monotonic() - begin) / 60, 1), "requests": dict(server.troubles)}
        result["lines in quarantine"] = len((folder / "quarantine.jsonl").read_text().splitlines())
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
