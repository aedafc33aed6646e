"""Builds shards of scenes with known answers: one to three objects with colour, shape, size and relation.

Sample i of a build depends on (seed, i) and the options alone, never on the number of processes.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from hdm_lightning.data.builders.ordered_map import ordered_map
from hdm_lightning.data.builders.progress import progress_bar
from hdm_lightning.data.builders.shapes_samples import (
    ENCODINGS,
    Prompt,
    ShapesOptions,
    heldout_prompts,
    make_fields,
    require,
    scene_prompts,
)
from hdm_lightning.data.builders.shapes_vocabulary import SPLITS, Split
from hdm_lightning.data.builders.writer import Field, ShardWriter

__all__ = ["Prompt", "add_arguments", "build_shapes", "heldout_prompts", "run", "scene_prompts"]

SAMPLES_PER_TASK = 64


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
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write `count` scenes into shards with an index under `folder`; return the folder.

    The other arguments are those of `ShapesOptions`; `objects` is a mapping from number to relative frequency
    or a list of equally likely numbers. `progress` is called with the number of samples written so far.

    Raises:
        UserError: for an option out of range, or a folder that already holds shards.
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
    tasks = [range(start, min(start + SAMPLES_PER_TASK, count)) for start in range(0, count, SAMPLES_PER_TASK)]
    # Starting a process costs more than drawing a few hundred scenes.
    workers = 1 if count <= 8 * SAMPLES_PER_TASK else processes
    with ShardWriter(folder, samples_per_shard=samples_per_shard, prefix="shapes") as writer:
        for samples in ordered_map(partial(_make_samples, options), tasks, processes=workers):
            for key, fields in samples:
                writer.write(key, fields)
            if progress is not None:
                progress(writer.samples_written)
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
    options = {name: value for name, value in vars(args).items() if name in _BUILD_OPTIONS}
    with progress_bar("scenes", args.count) as progress:
        folder = build_shapes(args.out, progress=progress, **options)
    print(f"{args.count} scenes, split {args.split}, short side {args.resolution} px: {folder}")
    return 0


_BUILD_OPTIONS = (
    "count",
    "seed",
    "resolution",
    "aspects",
    "continuous_aspects",
    "multiple",
    "objects",
    "split",
    "encoding",
    "variation",
    "samples_per_shard",
    "processes",
)


def _make_samples(options: ShapesOptions, indices: range) -> list[tuple[str, dict[str, Field]]]:
    return [(f"{index:08d}", make_fields(options, index)) for index in indices]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _frequencies(text: str) -> dict[int, float]:
    pairs = (part.partition(":") for part in text.split(","))
    return {int(number): float(frequency or 1) for number, _, frequency in pairs}
