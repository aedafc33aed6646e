"""Build shards from a folder of images with captions next to them (`.txt` or `.json` of the same name)."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hdm_lightning.argument_types import whole_number
from hdm_lightning.datasets.build import Item, Made, Report, build_shards
from hdm_lightning.datasets.source_files import SourceFolder, look_into
from hdm_lightning.datasets.source_images import (
    ImageOptions,
    add_shared_arguments,
    caption_fields,
    image_options,
    source_image,
)


def plain_texts(root: Path, item: Item, allow_missing: bool) -> Made:
    """Return an image's caption and record, with its file under `source` (`hdm_source` if that key is taken)."""
    return caption_fields(root, item.texts, {"source": item.name}, allow_missing=allow_missing)


@dataclass(frozen=True)
class Layout:
    """How a folder of images is read.

    Attributes:
        extensions: extensions of captions, without dots; the first found is used.
        texts: returns an image's caption and record, given the folder, the image, and whether a caption may be missing;
            raises `SampleFault` to reject it. Must be picklable.
        items: returns the samples to make from what was found, given also the `say` of `build_folder`.
        options: what else affects the content.
    """

    extensions: tuple[str, ...] = ("txt", "caption")
    texts: Callable[[Path, Item, bool], Made] = plain_texts
    items: Callable[[SourceFolder, Callable[[str], None] | None], list[Item]] = lambda found, say: found.images
    options: Mapping[str, Any] = field(default_factory=dict)


PLAIN = Layout()


def build_folder(
    folder: str | Path,
    out: str | Path,
    *,
    layout: Layout = PLAIN,
    images: ImageOptions | None = None,
    allow_missing: bool = False,
    follow_links: bool = False,
    samples_per_shard: int = 1000,
    processes: int | None = None,
    anew: bool = False,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Write shards of all images below a folder.

    Args:
        folder, out: folder of images, and folder for the shards.
        layout: which files are captions, and what becomes a sample.
        images: how images are encoded; None leaves them as they are.
        allow_missing: keep images without a caption.
        follow_links: also use what links out of the folder point to.
        samples_per_shard, processes, anew, say: as for `build_shards`.

    Raises:
        UserError: there are no images, none can be used, or `out` holds another build.
    """
    root, images = Path(folder).resolve(), images or ImageOptions()
    found = look_into(root, layout.extensions, follow_links=follow_links, out=Path(out))
    common = {"folder": str(root), "allow_missing": allow_missing, "follow_links": follow_links}
    return build_shards(
        Path(out),
        layout.items(found, say),
        partial(_sample, root, layout.texts, images, allow_missing),
        options={**common, **layout.options, **asdict(images)},
        unused=found.unused,
        samples_per_shard=samples_per_shard,
        processes=processes,
        anew=anew,
        say=say,
    )


def _sample(
    root: Path, texts: Callable[[Path, Item, bool], Made], images: ImageOptions, allow_missing: bool, item: Item
) -> Made:
    made = texts(root, item, allow_missing)
    return made._replace(fields={**source_image(root, item, images), **made.fields})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build folder`."""
    parser.add_argument("folder", help="folder with the images, searched to any depth")
    add_shared_arguments(parser)
    parser.add_argument(
        "--follow-links", action="store_true", help="also use outside files and folders that links point to"
    )
    parser.add_argument("--processes", type=whole_number(1), help="default: one per core")


def run(arguments: argparse.Namespace, layout: Layout = PLAIN) -> int:
    """Build from the arguments and print a summary."""
    names = ("allow_missing", "follow_links", "samples_per_shard", "processes", "anew")
    given = {name: getattr(arguments, name) for name in names}
    images = image_options(arguments)
    report = build_folder(arguments.folder, arguments.out, layout=layout, images=images, **given, say=print)
    print(report.told(arguments.out))
    return 0
