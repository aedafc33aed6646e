"""Build shards from a folder of images with captions next to them (`.txt` or `.json` of the same name)."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hdm_lightning.datasets.build import Item, Made, Report, build_shards
from hdm_lightning.datasets.source_files import look_into
from hdm_lightning.datasets.source_images import (
    ImageOptions,
    add_image_arguments,
    build_options,
    caption_fields,
    source_image,
)

CAPTION_EXTENSIONS = ("txt", "caption")


def build_folder(
    folder: str | Path,
    out: str | Path,
    *,
    images: ImageOptions | None = None,
    allow_missing: bool = False,
    follow_links: bool = False,
    samples_per_shard: int = 1000,
    processes: int | None = None,
    anew: bool = False,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Write shards of all images below a folder.

    The record of a sample has its file under `source` (`hdm_source` if the record has its own `source`).

    Args:
        folder, out: folder of images, and folder for the shards.
        images: how images are encoded; None leaves them as they are.
        allow_missing: keep images without a caption.
        follow_links: also use what links out of the folder point to.
        samples_per_shard, processes, anew, say: as for `build_shards`.

    Raises:
        UserError: there are no images, none can be used, or `out` holds another build.
    """
    images = images or ImageOptions()
    root = Path(folder).resolve()
    found = look_into(root, CAPTION_EXTENSIONS, follow_links=follow_links, out=Path(out))
    return build_shards(
        Path(out),
        [Item(image.name, 0, image.texts, image.state, image.mask) for image in found.images],
        partial(_sample, root, images, allow_missing),
        options={
            "folder": str(root),
            "allow_missing": allow_missing,
            "follow_links": follow_links,
            **asdict(images),
        },
        unused=found.unused,
        samples_per_shard=samples_per_shard,
        processes=processes,
        anew=anew,
        say=say,
    )


def _sample(root: Path, images: ImageOptions, allow_missing: bool, item: Item) -> Made:
    fields, unused = caption_fields(root, item.texts, {"source": item.name}, allow_missing=allow_missing)
    return Made({**source_image(root, item, images), **fields}, unused)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build folder`."""
    add_image_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build from the arguments and print a summary."""
    report = build_folder(arguments.folder, arguments.out, **build_options(arguments), say=print)
    print(report.told(Path(arguments.out)))
    return 0
