"""Turn files of images and captions into the fields of a sample: checked, shrunk and encoded as requested."""

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hdm_lightning.argument_types import whole_number
from hdm_lightning.data.alpha_masks import load_with_alpha, shrunk, with_mask
from hdm_lightning.data.captions import (
    MAX_CAPTION_BYTES,
    MAX_RECORD_BYTES,
    CaptionRules,
    is_blank,
    parse_record,
    text_of,
)
from hdm_lightning.data.decode import MAX_FILE_BYTES
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.image_headers import format_of
from hdm_lightning.datasets.build import Item, Made
from hdm_lightning.datasets.source_files import read_file
from hdm_lightning.datasets.writer import Field

KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
ENCODINGS = ("keep", "webp", "jpeg")
MOST_WEBP_PX = 16383
"""Longest side of a WebP image."""


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored in shards.

    Attributes:
        encoding: `keep` leaves JPEG, PNG and WebP files as they are and writes others as WebP; `jpeg` rejects images
            with transparency, which it cannot hold.
        quality: quality of re-encoded images, 1 to 100.
        short_side_px: larger images are shrunk to this short side; None leaves them as they are.
        min_size_px: images with a smaller short side are rejected.
    """

    encoding: str = "keep"
    quality: int = 92
    short_side_px: int | None = None
    min_size_px: int = 1


def source_image(root: Path, item: Item, options: ImageOptions) -> dict[str, Field]:
    """Return the image of an item, with its mask if it has one; see `image_field`.

    Raises:
        SampleFault: either cannot be used.
        OSError: either cannot be read.
    """
    mask = None if item.mask is None else read_file(root / item.mask, MAX_FILE_BYTES)
    return image_field(read_file(root / item.name, MAX_FILE_BYTES), options, mask)


def image_field(data: bytes, options: ImageOptions, mask: bytes | None = None) -> dict[str, Field]:
    """Return the image under the extension of its format, after a full decode; a mask becomes its alpha.

    Transparency is kept, with the colors under it; an image with a mask is never JPEG.

    Raises:
        SampleFault: the image cannot be used.
    """
    image = load_with_alpha(data)
    if min(image.size) < options.min_size_px:
        raise SampleFault(f"too small: {image.width}x{image.height} pixels")
    short, kind = options.short_side_px, format_of(data)
    shrink = short is not None and min(image.size) > short
    if mask is None and options.encoding == "keep" and not shrink and kind in KEPT:
        return {KEPT[kind]: data}
    if short is not None:
        image = shrunk(image, short)
    if mask is not None:
        return _encoded(with_mask(image, mask), "WEBP", options)
    if options.encoding == "jpeg" and image.mode == "RGBA":
        raise SampleFault("has transparency, which JPEG cannot hold (--encoding webp keeps it)")
    stays_jpeg = options.encoding == "keep" and kind == "JPEG"
    return _encoded(image, "JPEG" if options.encoding == "jpeg" or stays_jpeg else "WEBP", options)


def _encoded(image: Image.Image, kind: str, options: ImageOptions) -> dict[str, Field]:
    buffer = io.BytesIO()
    # exact: keep the colors under the alpha
    more = {"subsampling": 0} if kind == "JPEG" else {"method": 4, "exact": image.mode == "RGBA"}
    if image.mode == "RGBA" and max(image.size) > MOST_WEBP_PX:
        kind, more = "PNG", {}
    try:
        image.save(buffer, kind, quality=options.quality, **more)
    except (OSError, ValueError) as error:  # sides are limited to 16383 pixels in WebP, 65500 in JPEG
        raise SampleFault(f"cannot be written as {kind}: {error}") from error
    return {KEPT[kind]: buffer.getvalue()}


def caption_fields(root: Path, texts: Sequence[str], record: Mapping[str, object], *, allow_missing: bool) -> Made:
    """Return an image's caption and record with `record` added, and which files cannot be used.

    An unreadable record is left out if there is a caption next to it. Its own values stay as they are; values of
    `record` under keys that it has are written as `hdm_KEY`.

    Args:
        root, texts: folder and files, as found by `source_files.look_into`.
        record: additional values for the JSON record.
        allow_missing: accept an image without a caption.

    Raises:
        SampleFault: the caption is missing or cannot be read; the message names the file.
    """
    fields: dict[str, Field] = {}
    theirs: dict[str, object] = {}
    unused: list[tuple[str, str]] = []
    for name in texts:
        try:
            if name.lower().endswith(".json"):
                theirs = parse_record(read_file(root / name, MAX_RECORD_BYTES))
            else:
                fields["txt"] = text_of(read_file(root / name, MAX_CAPTION_BYTES))
        except (SampleFault, OSError) as fault:
            if "txt" not in fields or is_blank(str(fields["txt"])):
                raise SampleFault(f"{fault} (in {name})") from fault
            unused.append((name, f"record left out: {fault}"))
    members = {"txt": str(fields["txt"]).encode("utf-8", "replace")} if "txt" in fields else {}
    if is_blank(str(fields.get("txt", ""))):
        members["json"] = json.dumps(theirs).encode()
    try:
        CaptionRules(allow_missing=allow_missing).first(members)
    except SampleFault as fault:
        raise SampleFault(f"{fault} (in {', '.join(texts)})" if texts else str(fault)) from fault
    own = {name if name not in theirs else f"hdm_{name}": value for name, value in record.items()}
    return Made({**fields, "json": {**theirs, **own}}, unused)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all builders from images or tables share."""
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for the shards; an interrupted build in it is resumed"
    )
    parser.add_argument("--anew", action="store_true", help="rebuild all shards")
    parser.add_argument("--samples-per-shard", type=whole_number(1), default=1000)
    parser.add_argument("--encoding", choices=ENCODINGS, default="keep", help="default: leave images as they are")
    parser.add_argument("--quality", type=whole_number(1, 100), default=92, help="quality of re-encoded images")
    parser.add_argument("--short-side", type=whole_number(1), metavar="PX", help="shrink larger images to this side")
    parser.add_argument("--min-size", type=whole_number(1), default=1, metavar="PX", help="reject smaller images")
    parser.add_argument("--allow-missing", action="store_true", help="keep images without a caption")


def image_options(arguments: argparse.Namespace) -> ImageOptions:
    """Return the image options from the arguments of `add_shared_arguments`."""
    return ImageOptions(arguments.encoding, arguments.quality, arguments.short_side, arguments.min_size)
