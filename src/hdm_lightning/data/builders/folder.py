"""Builds shards from a folder of pictures with captions beside them (`.txt` or `.json` of the same name)."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hdm_lightning.data.builders.pictures import (
    PictureOptions,
    add_picture_arguments,
    caption_fields,
    list_pictures,
    picture_field,
    picture_options,
)
from hdm_lightning.data.builders.shard_build import Item, Report, build_shards
from hdm_lightning.data.builders.writer import Field

CAPTION_EXTENSIONS = ("txt", "caption")


def build_folder(
    folder: str | Path,
    out: str | Path,
    *,
    pictures: PictureOptions | None = None,
    allow_missing: bool = False,
    samples_per_shard: int = 1000,
    processes: int | None = None,
) -> Report:
    """Write shards of all pictures below a folder.

    The record of a sample says under `source` which file it came from.

    Args:
        folder, out: pictures, and where the shards go.
        pictures: how pictures are encoded; None leaves them as they are.
        allow_missing: keep pictures without a caption.
        samples_per_shard, processes: as for `build_shards`.

    Raises:
        UserError: there is no picture, none can be used, or `out` holds another build.
    """
    pictures = pictures or PictureOptions()
    root = Path(folder).resolve()
    return build_shards(
        Path(out),
        [Item(name) for name in list_pictures(root)],
        partial(_sample, root, pictures, allow_missing),
        options={"folder": str(root), "allow_missing": allow_missing, **asdict(pictures)},
        samples_per_shard=samples_per_shard,
        processes=processes,
    )


def _sample(root: Path, pictures: PictureOptions, allow_missing: bool, item: Item) -> dict[str, Field]:
    path = root / item.name
    fields = caption_fields(path, CAPTION_EXTENSIONS, {"source": item.name}, allow_missing=allow_missing)
    return {**picture_field(path.read_bytes(), pictures), **fields}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build folder`."""
    add_picture_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build as the arguments say and print what was written."""
    report = build_folder(
        arguments.folder,
        arguments.out,
        pictures=picture_options(arguments),
        allow_missing=arguments.allow_missing,
        samples_per_shard=arguments.samples_per_shard,
        processes=arguments.processes,
    )
    print(f"{report.samples} samples, {len(report.rejected)} files rejected: {arguments.out}")
    return 0
