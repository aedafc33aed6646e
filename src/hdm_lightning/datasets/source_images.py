"""Files of images and captions to the fields of a sample: checked, shrunk and encoded as asked."""

import argparse
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hdm_lightning.data.captions import CaptionRules, parse_record
from hdm_lightning.data.decode import load_upright
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.image_kinds import format_of
from hdm_lightning.datasets.writer import Field

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
ENCODINGS = ("keep", "webp", "jpeg")


@dataclass(frozen=True)
class ImageOptions:
    """How images go into shards.

    Attributes:
        encoding: `keep` leaves JPEG, PNG and WebP files as they are and writes others as WebP.
        quality: of images that are encoded anew, 1 to 100.
        short_side_px: larger images are shrunk to this short side; None leaves them.
        min_size_px: images with a smaller short side are rejected.
    """

    encoding: str = "keep"
    quality: int = 92
    short_side_px: int | None = None
    min_size_px: int = 1


def list_images(folder: Path) -> list[str]:
    """Paths of all images below a folder, relative to it and sorted; hidden ones are left out."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def image_field(data: bytes, options: ImageOptions) -> dict[str, Field]:
    """The image under the extension of its format, after a full decode.

    Raises:
        SampleFault: it cannot be used.
    """
    image = load_upright(data)
    if min(image.size) < options.min_size_px:
        raise SampleFault(f"too small: {image.width}x{image.height} pixels")
    short = options.short_side_px
    shrink = short is not None and min(image.size) > short
    kind = format_of(data)
    if options.encoding == "keep" and not shrink and kind in KEPT:
        return {KEPT[kind]: data}
    if short is not None and shrink:
        scale = short / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    stays_jpeg = options.encoding == "keep" and kind == "JPEG"
    return _encoded(image, "JPEG" if options.encoding == "jpeg" or stays_jpeg else "WEBP", options)


def _encoded(image: Image.Image, kind: str, options: ImageOptions) -> dict[str, Field]:
    buffer = io.BytesIO()
    more = {"subsampling": 0} if kind == "JPEG" else {"method": 4}
    try:
        image.save(buffer, kind, quality=options.quality, **more)
    except (OSError, ValueError) as error:  # WebP has no side longer than 16383 pixels, JPEG none longer than 65500
        raise SampleFault(f"cannot be written as {kind}: {error}") from error
    return {KEPT[kind]: buffer.getvalue()}


def caption_fields(
    image: Path, extensions: Sequence[str], record: Mapping[str, object], *, allow_missing: bool
) -> dict[str, Field]:
    """The caption beside an image, and its record with `record` added.

    Args:
        image: file whose name with another extension is the caption.
        extensions: of caption files, first found first, without dots.
        record: what else the JSON record is to say.
        allow_missing: an image without a caption is used.

    Raises:
        SampleFault: the caption is missing or cannot be read.
    """
    raw: dict[str, bytes] = {}
    for extension in extensions:
        beside = image.with_suffix(f".{extension}")
        if beside.is_file():
            raw["txt"] = beside.read_bytes()
            break
    beside = image.with_suffix(".json")
    if beside.is_file():
        raw["json"] = beside.read_bytes()
    CaptionRules(allow_missing=allow_missing).first(raw)
    fields: dict[str, Field] = {"txt": raw["txt"].decode("utf-8-sig")} if "txt" in raw else {}
    return {**fields, "json": {**(parse_record(raw["json"]) if "json" in raw else {}), **record}}


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all builders from image files share."""
    parser.add_argument("folder", help="folder with the images, searched to any depth")
    parser.add_argument("--out", required=True, help="folder for the shards; an interrupted build resumes there")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--encoding", choices=ENCODINGS, default="keep", help="default: leave files as they are")
    parser.add_argument("--quality", type=int, default=92, help="of what is encoded anew (default %(default)s)")
    parser.add_argument("--short-side", type=int, metavar="PX", help="shrink larger images to this short side")
    parser.add_argument("--min-size", type=int, default=1, metavar="PX", help="reject images with a smaller side")
    parser.add_argument("--allow-missing", action="store_true", help="keep images without a caption")
    parser.add_argument("--processes", type=int, help="default: one a core")


def build_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_image_arguments` asked for, as the builders take it."""
    return {
        "images": ImageOptions(arguments.encoding, arguments.quality, arguments.short_side, arguments.min_size),
        "allow_missing": arguments.allow_missing,
        "samples_per_shard": arguments.samples_per_shard,
        "processes": arguments.processes,
    }
