"""A set in the layout of img2dataset, as CC12M and COYO-700M arrive, made of the drawings of this repository.

Each sample is a drawing, mirrored or not, on a background of its own and of its own size; a share of the rows failed.
"""

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from hdm_lightning.data.index import load_index

PER_SHARD = 1_000
FAILED = 0.18
"""Share of rows without an image, about what web sets of this age lose."""

LARGEST_PX = 192
NOT_AN_IMAGE = 0.004
"""Of the images that were "downloaded": pages of errors that were kept under the name of an image."""


def drawings(folder: Path) -> list[tuple[Image.Image, str]]:
    """The repository's drawings with their captions."""
    found = []
    for record in load_index(folder).shards:
        with tarfile.open(folder / record.name) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
        for name, content in members.items():
            stem, _, kind = name.rpartition(".")
            if kind in ("png", "webp", "jpg"):
                found.append((Image.open(io.BytesIO(content)).convert("RGBA"), _caption(members, stem)))
    return found


def _caption(members: dict[str, bytes], stem: str) -> str:
    if f"{stem}.txt" in members:
        return members[f"{stem}.txt"].decode()
    first = json.loads(members[f"{stem}.json"])["captions"][0]
    return first if isinstance(first, str) else first["text"]


def image_of(drawing: Image.Image, random: np.random.Generator) -> bytes:
    """A JPEG of a drawing, its long side at most `LARGEST_PX`."""
    size = int(random.integers(40, LARGEST_PX + 1))
    small = drawing.copy()
    small.thumbnail((size, size))
    if random.random() < 0.5:
        small = ImageOps.mirror(small)
    page = Image.new("RGB", small.size, tuple(random.integers(180, 256, 3).tolist()))
    page.paste(small, mask=small)
    file = io.BytesIO()
    page.save(file, "JPEG", quality=int(random.integers(75, 96)))
    return file.getvalue()


def row(number: int, key: str, caption: str, random: np.random.Generator) -> dict[str, Any]:
    """What img2dataset notes of a row, with the columns that COYO-700M brings along."""
    return {
        "url": f"https://images.example/{number}.jpg",
        "caption": caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": None,
        "height": None,
        "original_width": None,
        "original_height": None,
        "exif": "{}",
        "sha256": None,
        "clip_similarity_vitb32": float(random.normal(0.3, 0.04)),
        "watermark_score": float(random.beta(1, 4)),
        "aesthetic_score_laion_v2": float(random.normal(5, 0.7)),
    }


def write_shard(folder: Path, number: int, samples: int, drawn: list[tuple[Image.Image, str]]) -> None:
    """One shard with its parquet and its statistics."""
    random, rows = np.random.default_rng(number), []
    with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
        for place in range(samples):
            drawing, caption = drawn[int(random.integers(len(drawn)))]
            found = row(number * samples + place, f"{number:05d}{place:04d}", caption, random)
            rows.append(found)
            lot = random.random()
            if lot < FAILED:
                kind = "failed_to_download" if lot < 0.9 * FAILED else "failed_to_resize"
                found |= {"status": kind, "error_message": "HTTP Error 404: Not Found"}
                continue
            content = image_of(drawing, random)
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
            found |= {"width": width, "height": height, "original_width": 3 * width, "original_height": 3 * height}
            if random.random() < NOT_AN_IMAGE:
                content = b"<!DOCTYPE html><html><title>404</title></html>"
            found["sha256"] = hashlib.sha256(content).hexdigest()
            parts = {"jpg": content, "txt": caption.encode(), "json": json.dumps(found, indent=4).encode()}
            for kind, data in parts.items():
                member = tarfile.TarInfo(f"{found['key']}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet")
    states = [each["status"] for each in rows]
    stats = {"count": samples, **{name: states.count(name) for name in ("failed_to_download", "failed_to_resize")}}
    stats |= {"successes": states.count("success"), "status_dict": {name: states.count(name) for name in set(states)}}
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats, indent=4))


def write_odd_files(folder: Path) -> None:
    """What a download of days leaves behind: a folder of the tool, files of file managers, a shard that was cut."""
    (folder / "_tmp").mkdir()
    (folder / "_tmp" / "0.feather").write_bytes(b"ARROW1")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    last = sorted(folder.glob("*.tar"))[-1]
    cut = folder / f"{int(last.stem) + 1:05d}.tar"
    content = last.read_bytes()
    cut.write_bytes(content[: len(content) // 3 + 137])


def main() -> None:
    """Write the set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=61_000, help="of the list of addresses; about 50,000 have an image")
    parser.add_argument("--drawings", type=Path, default=Path("data/openclipart-mini"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    drawn = drawings(arguments.drawings)
    for number in range(arguments.rows // PER_SHARD):
        write_shard(arguments.out, number, PER_SHARD, drawn)
    write_odd_files(arguments.out)


if __name__ == "__main__":
    main()
