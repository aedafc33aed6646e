"""Builds shards from a folder of images with captions beside them (`.txt` or `.json` of the same name)."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hdm_lightning.datasets.build import Item, Report, build_shards
from hdm_lightning.datasets.source_images import (
    ImageOptions,
    add_image_arguments,
    build_options,
    caption_fields,
    image_field,
    list_images,
    mask_beside,
)
from hdm_lightning.datasets.writer import Field

CAPTION_EXTENSIONS = ("txt", "caption")


def build_folder(
    folder: str | Path,
    out: str | Path,
    *,
    images: ImageOptions | None = None,
    allow_missing: bool = False,
    samples_per_shard: int = 1000,
    processes: int | None = None,
) -> Report:
    """Write shards of all images below a folder.

    The record of a sample says under `source` which file it came from.

    Args:
        folder, out: images, and where the shards go.
        images: how images are encoded; None leaves them as they are.
        allow_missing: keep images without a caption.
        samples_per_shard, processes: as for `build_shards`.

    Raises:
        UserError: there is no image, none can be used, or `out` holds another build.
    """
    images = images or ImageOptions()
    root = Path(folder).resolve()
    return build_shards(
        Path(out),
        [Item(name) for name in list_images(root)],
        partial(_sample, root, images, allow_missing),
        options={"folder": str(root), "allow_missing": allow_missing, **asdict(images)},
        samples_per_shard=samples_per_shard,
        processes=processes,
    )


def _sample(root: Path, images: ImageOptions, allow_missing: bool, item: Item) -> dict[str, Field]:
    path = root / item.name
    fields = caption_fields(path, CAPTION_EXTENSIONS, {"source": item.name}, allow_missing=allow_missing)
    return {**image_field(path.read_bytes(), images, mask_beside(path)), **fields}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build folder`."""
    add_image_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build as the arguments say and print what was written."""
    report = build_folder(arguments.folder, arguments.out, **build_options(arguments))
    print(f"{report.samples} samples, {len(report.rejected)} files rejected: {arguments.out}")
    return 0
