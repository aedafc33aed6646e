"""A data set as img2dataset writes it: fetched by img2dataset itself from the addresses of `web`, or imitated.

Three downloads into one folder: one as in `conf/data/coyo700m.yaml`; one that kept the files as they were
(`--disable_all_reencoding`), so it includes HTML pages and truncated images; one that was killed.
"""

import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from experiments.broad_data.web import DEAD, PAGE, Address, Web, WebServer
from PIL import Image

COLUMNS = ["clip_similarity_vitb32", "watermark_score", "aesthetic_score_laion_v2"]
ADDRESSES = ["--input_format", "parquet", "--url_col", "url", "--caption_col", "text"]
KEPT = ["--output_format", "webdataset", "--save_additional_columns", json.dumps(COLUMNS)]
RESIZED = ["--resize_mode", "keep_ratio", "--resize_only_if_bigger", "True", "--image_size", "512"]
AS_THEY_ARE = ["--incremental_mode", "extend", "--disable_all_reencoding", "True"]
NO_CERTIFICATES = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull, "NO_ALBUMENTATIONS_UPDATE": "1"}
"""Otherwise each plain http request of img2dataset would load all certificates of the machine."""

ERRORS = {
    "404": "HTTP Error 404: Not Found",
    "403": "HTTP Error 403: Forbidden",
    "500": "HTTP Error 500: Internal Server Error",
    "cut_off": "Remote end closed connection without response",
    "opted_out": "Use of image disallowed by X-Robots-Tag directive",
    "page": "Image decoding error",
    "half": "Image decoding error",
}


@dataclass(frozen=True)
class Sizes:
    """Number of addresses of each download."""

    whole: int = 61_000
    as_they_are: int = 1_000
    killed: int = 1_000
    per_shard: int = 1_000


def fetch(web: Web, folder: Path, sizes: Sizes, img2dataset: str) -> None:
    """Let img2dataset fill a folder, and kill it in the first shard of the third download."""
    server = WebServer(web)

    def start(first: int, count: int, *more: str) -> subprocess.Popen[bytes]:
        table = [_listed(web.address(number), server) for number in range(first, first + count)]
        lists = folder.with_name(f"list-{first}")
        lists.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table), lists / "part-00000.parquet")
        words = [img2dataset, "--url_list", str(lists), *ADDRESSES, *KEPT, *RESIZED, "--output_folder", str(folder)]
        words += ["--number_sample_per_shard", str(sizes.per_shard), "--thread_count", "16", *more]
        print("$", *words, flush=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(words, env={**os.environ, **NO_CERTIFICATES}, start_new_session=True, **quiet)

    for first, count, more in ((0, sizes.whole, []), (sizes.whole, sizes.as_they_are, AS_THEY_ARE)):
        if status := start(first, count, *more).wait():
            raise RuntimeError(f"img2dataset ended with status {status}")
    known = set(folder.glob("*.tar"))
    killed = start(sizes.whole + sizes.as_they_are, sizes.killed, "--incremental_mode", "extend")
    half = 4_000 * min(sizes.killed, sizes.per_shard)
    while sum(path.stat().st_size for path in set(folder.glob("*.tar")) - known) < half:
        if killed.poll() is not None:
            raise RuntimeError("img2dataset ended before it could be killed")
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    server.shutdown()


def _listed(address: Address, server: WebServer) -> dict[str, Any]:
    return {"url": server.url(address.number), "text": address.text, **address.scores}


def imitate(web: Web, folder: Path, sizes: Sizes) -> None:
    """Fill a folder as `fetch` does, without img2dataset; `layout` checks whether the two differ."""
    folder.mkdir(parents=True)
    shard = 0
    for count, reencoded in ((sizes.whole, True), (sizes.as_they_are, False), (sizes.killed, True)):
        for begin in range(0, count, sizes.per_shard):
            first = shard * sizes.per_shard + begin
            write_shard(web, folder, shard + begin // sizes.per_shard, first, sizes.per_shard, reencoded=reencoded)
        shard += count // sizes.per_shard
    last = folder / f"{shard - 1:05d}.tar"
    content = last.read_bytes()
    last.write_bytes(content[: 10_240 * (len(content) // 25_000)])
    last.with_suffix(".parquet").write_bytes(b"")
    last.with_name(f"{last.stem}_stats.json").unlink()
    (folder / "_tmp").mkdir()
    (folder / "_tmp" / f"{shard - 1}.feather").write_bytes(b"ARROW1\0\0")


def write_shard(web: Web, folder: Path, shard: int, first: int, count: int, *, reencoded: bool) -> None:
    """Write one shard with its parquet file and its statistics."""
    rows, states, digits = [], Counter[str](), len(str(count - 1))
    with tarfile.open(folder / f"{shard:05d}.tar", "w|", format=tarfile.PAX_FORMAT) as archive:
        for place in range(count):
            address = web.address(first + place)
            row, content = _row(web, address, f"{shard:05d}{place:0{digits}d}", reencoded=reencoded)
            rows.append(row)
            states[row["error_message"] or "success"] += 1
            text = (address.text or "").encode()
            parts = {"jpg": content, "json": json.dumps(row, indent=4).encode(), "txt": text} if content else {}
            for kind, data in parts.items():
                member = tarfile.TarInfo(f"{row['key']}.{kind}")
                member.size, member.mode, member.mtime = len(data), 0o444, time.time()
                member.uname = member.gname = "bigdata"
                archive.addfile(member, io.BytesIO(data))
    schema = pa.schema([(name, _type(name)) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{shard:05d}.parquet")
    failed = Counter(row["status"] for row in rows)
    stats = {"count": count, "successes": failed["success"]}
    stats |= {name: failed[name] for name in ("failed_to_download", "failed_to_resize")}
    stats |= {"duration": 1.0, "start_time": time.time() - 1, "end_time": time.time(), "status_dict": states}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))


def _type(name: str) -> pa.DataType:
    sizes = ("width", "height", "original_width", "original_height")
    return pa.float64() if name in COLUMNS else pa.int32() if name in sizes else pa.string()


def _row(web: Web, address: Address, key: str, *, reencoded: bool) -> tuple[dict[str, Any], bytes | None]:
    """Return the row of an address, and its image file."""
    row: dict[str, Any] = {
        **address.scores,
        "caption": address.text,
        "url": f"http://127.0.0.1/{address.number}.jpg",
        "key": key,
    }
    row |= {"status": "success", "error_message": None, "width": None, "height": None}
    row |= {"original_width": None, "original_height": None, "exif": None, "sha256": None}
    undecodable = address.answer in ("page", "half")
    if (address.answer in DEAD and not undecodable) or (undecodable and reencoded):
        kind = "failed_to_resize" if undecodable else "failed_to_download"
        return row | {"status": kind, "error_message": ERRORS[address.answer]}, None
    content = PAGE if address.answer == "page" else web.image(address)
    turned = {"Image Orientation": "Rotated 90 CW"} if address.answer == "turned" else {}
    row |= {"exif": json.dumps(turned), "sha256": hashlib.sha256(content).hexdigest()}
    if not reencoded:
        return row, content
    content, (width, height) = _reencoded(content)
    return row | {"width": width, "height": height, "original_width": width, "original_height": height}, content


def _reencoded(content: bytes) -> tuple[bytes, tuple[int, int]]:
    """Reencode an image as JPEG, transparency on white; EXIF is neither applied nor kept."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    file = io.BytesIO()
    image.convert("L" if image.mode == "L" else "RGB").save(file, "JPEG", quality=95)
    return file.getvalue(), image.size
