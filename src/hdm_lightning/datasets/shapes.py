"""Builds shards of scenes with known answers: one to three objects with colour, shape, size and relation.

Sample i of a build depends on (seed, i) and the options alone, never on the number of processes; an interrupted build
resumes where it was.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hdm_lightning.datasets.build import Item, build_shards
from hdm_lightning.datasets.shapes_samples import (
    ENCODINGS,
    Prompt,
    ShapesOptions,
    heldout_prompts,
    make_fields,
    require,
    scene_prompts,
)
from hdm_lightning.datasets.shapes_scenes import SPLITS, Split
from hdm_lightning.datasets.writer import Field

__all__ = ["Prompt", "add_arguments", "build_shapes", "heldout_prompts", "run", "scene_prompts"]

FEW_SCENES = 512
"""Starting a process costs more than drawing so many."""


def build_shapes(
    folder: str | Path,
    *,
    count: int,
    seed: int = 0,
    resolution: int = 64,
    aspects: Sequence[float] = (1.0,),
    continuous_aspects: bool = False,
    multiple: int = 8,
    objects: Mapping[int, float] | Sequence[int] = (1,),
    split: Split = "train",
    encoding: str = "webp",
    variation: float = 1.0,
    samples_per_shard: int = 1000,
    processes: int | None = None,
) -> Path:
    """Write `count` scenes into shards with an index under `folder`; return the folder.

    The other arguments are those of `ShapesOptions`; `objects` is a mapping from number to relative frequency
    or a list of equally likely numbers.

    Raises:
        UserError: for an option out of range, or a folder that holds another build.
    """
    require(count >= 1, "count", count, "1 or more")
    weights = objects if isinstance(objects, Mapping) else dict.fromkeys(objects, 1.0)
    options = ShapesOptions(
        seed,
        resolution,
        tuple(aspects),
        continuous_aspects,
        multiple,
        tuple(sorted(weights.items())),
        split,
        encoding,
        variation,
    )
    build_shards(
        Path(folder),
        [Item(str(index)) for index in range(count)],
        partial(_sample, options),
        options={"source": "shapes", **asdict(options)},
        samples_per_shard=samples_per_shard,
        processes=1 if count <= FEW_SCENES else processes,
        prefix="shapes",
    )
    return Path(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build shapes`."""
    parser.add_argument("--out", required=True, help="folder for the shards and their index")
    parser.add_argument("--count", type=int, default=10000, help="number of scenes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, default=64, help="short side in pixels (default %(default)s)")
    parser.add_argument(
        "--aspects", type=_numbers, default=(1.0,), metavar="A,B,…", help="ratios of width to height (default 1)"
    )
    parser.add_argument(
        "--continuous-aspects", action="store_true", help="draw ratios between the least and greatest of --aspects"
    )
    parser.add_argument("--multiple", type=int, default=8, help="round the long side to this (default %(default)s)")
    parser.add_argument(
        "--objects",
        type=_frequencies,
        default={1: 1.0},
        metavar="1:P,2:P,3:P",
        help="objects a scene with relative frequencies, as 1:0.6,2:0.3,3:0.1, or 1,2,3 for equal (default 1)",
    )
    parser.add_argument("--split", choices=SPLITS, default="train", help="combinations shown (default %(default)s)")
    parser.add_argument("--encoding", choices=tuple(ENCODINGS), default="webp", help="both lossless")
    parser.add_argument("--variation", type=float, default=1.0, help="0: easy, in fixed places; 1 (default): anywhere")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--processes", type=int, help="default: one a core")


def run(args: argparse.Namespace) -> int:
    """Build as the arguments say and print one line of what was written."""
    folder = build_shapes(args.out, **{name: value for name, value in vars(args).items() if name != "out"})
    print(f"{args.count} scenes, split {args.split}, short side {args.resolution} px: {folder}")
    return 0


def _sample(options: ShapesOptions, item: Item) -> dict[str, Field]:
    return make_fields(options, int(item.name))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _frequencies(text: str) -> dict[int, float]:
    pairs = (part.partition(":") for part in text.split(","))
    return {int(number): float(frequency or 1) for number, _, frequency in pairs}
