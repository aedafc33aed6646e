"""The shapes dataset: scenes of one to three objects with color, shape, size and relation, their truth and prompts.

Sample i of a build depends only on (seed, i) and the options, never on the number of processes; an interrupted build
resumes where it stopped.
"""

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdm_lightning.argument_types import whole_number
from hdm_lightning.datasets.build import JOURNAL, Item, Made, build_shards
from hdm_lightning.datasets.shapes_drawing import box_of, draw
from hdm_lightning.datasets.shapes_scenes import (
    FORMER_RULE,
    OPPOSITE,
    RULES,
    SPLITS,
    Combination,
    HeldOut,
    Scene,
    Split,
    combinations,
    pick_number,
    sample_scene,
)
from hdm_lightning.errors import UserError

FEW_SCENES = 512
"""Starting processes costs more than drawing this many scenes."""

MAX_OBJECTS = 3
MIN_RESOLUTION_PX = 16
# Lossless; of the settings that make small files of flat drawings, these are the fastest.
ENCODINGS: dict[str, dict[str, Any]] = {
    "webp": {"format": "WEBP", "lossless": True, "method": 2, "quality": 20},
    "png": {"format": "PNG", "compress_level": 6},
}


@dataclass(frozen=True)
class ShapesOptions:
    """What a build draws.

    Attributes:
        seed: base seed of every sample.
        resolution: the short side in pixels.
        aspects: width / height; each sample takes one of them, equally likely.
        continuous_aspects: instead draw log-uniformly between the smallest and the largest of `aspects`.
        multiple: the long side is rounded to a multiple of this many pixels.
        objects: relative frequency of scenes of one, two and three objects.
        split: "train" leaves out the held-out combinations, also in scenes of several objects; "heldout" has
            only these; "all" has both.
        held_out: "pairs" of color and shape; "triples", as in older sets, leaves out each of the same pairs in one
            size only.
        encoding: "webp" (lossless) or "png".
        variation: from 0 (one object large within its range and at the center, two in the middles of the halves:
            easy to learn) to 1 (anywhere).
    """

    seed: int = 0
    resolution: int = 64
    aspects: tuple[float, ...] = (1.0,)
    continuous_aspects: bool = False
    multiple: int = 8
    objects: tuple[tuple[int, float], ...] = ((1, 1.0),)
    split: Split = "train"
    encoding: str = "webp"
    variation: float = 1.0
    held_out: HeldOut = "pairs"

    def __post_init__(self) -> None:
        require(self.resolution >= MIN_RESOLUTION_PX, "resolution", self.resolution, "16 pixels or more")
        require(self.multiple >= 1, "multiple", self.multiple, "1 or more")
        require(
            bool(self.aspects) and all(0.1 <= a <= 10 for a in self.aspects),
            "aspects",
            self.aspects,
            "at least one ratio of width to height between 0.1 and 10",
        )
        require(
            bool(self.objects)
            and all(1 <= n <= MAX_OBJECTS and p >= 0 for n, p in self.objects)
            and sum(p for _, p in self.objects) > 0,
            "objects",
            self.objects,
            "numbers from 1 to 3, with frequencies that are not negative and not all zero",
        )
        require(self.split in SPLITS, "split", self.split, f"one of {', '.join(SPLITS)}")
        require(self.held_out in RULES, "held_out", self.held_out, f"one of {', '.join(RULES)}")
        require(0 <= self.variation <= 1, "variation", self.variation, "a number from 0 to 1")
        require(self.encoding in ENCODINGS, "encoding", self.encoding, f"one of {', '.join(ENCODINGS)}")


@dataclass(frozen=True)
class Prompt:
    """A caption, what its image must show (as `truth`, without sizes and positions in pixels), and such a scene."""

    caption: str
    spec: dict[str, Any]
    scene: Scene

    def image(self, side_px: int) -> NDArray[np.uint8]:
        """Return a correct image for the prompt, uint8 (side, side, 3)."""
        return draw(replace(self.scene, width=side_px, height=side_px))


def make_scene(options: ShapesOptions, index: int) -> Scene:
    """Return the scene of sample `index`."""
    rng = np.random.default_rng([options.seed, index])
    width, height = _size(rng, options)
    number = pick_number(rng, dict(options.objects))
    choices = combinations(options.split, options.held_out)
    return sample_scene(rng, width=width, height=height, objects=number, choices=choices, variation=options.variation)


def make_image(options: ShapesOptions, index: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Return sample `index` as an image, uint8 (H, W, 3), and its truth."""
    scene = make_scene(options, index)
    facts = truth(scene)
    # Records without the key, as in every set built before there was a choice, have the former rule.
    return draw(scene), facts if options.held_out == FORMER_RULE else {**facts, "held_out": options.held_out}


def rule_of(record: Mapping[str, Any]) -> HeldOut:
    """Return the held-out rule of the set that a sample is from, given its record."""
    rule = record.get("held_out", FORMER_RULE)
    return rule if rule in RULES else FORMER_RULE


def rule_of_build(folder: Path) -> HeldOut:
    """Return the held-out rule of the set that `build_shapes` wrote into a folder."""
    header, _, _ = (folder / JOURNAL).read_text(encoding="utf-8").partition("\n")
    return rule_of(json.loads(header))


def truth(scene: Scene) -> dict[str, Any]:
    """Return the content of a sample's `.json`.

    `objects`: `colour`, `shape`, `size`, and in fractions of the image's width and height `centre` [x, y] and `box`
    [left, top, right, bottom]; `relations`: [subject, relation, object] by position in `objects`; `background`;
    `width` and `height` in pixels; `captions`, the plainest first.
    """
    things = []
    for thing in scene.objects:
        left, top, right, bottom = (round(edge, 5) for edge in box_of(thing, scene))
        centre = [round((left + right) / 2, 5), round((top + bottom) / 2, 5)]
        things.append({**thing.combination._asdict(), "centre": centre, "box": [left, top, right, bottom]})
    return {
        **_spec(scene),
        "objects": things,
        "width": scene.width,
        "height": scene.height,
        "captions": captions(scene),
    }


def scene_prompts(
    count: int, *, split: Split = "all", objects: int = 1, seed: int = 0, rule: HeldOut = "pairs"
) -> list[Prompt]:
    """Return prompts of a split in a fixed order: its combinations in rotation, with random backgrounds.

    `spec` holds `objects` (`colour`, `shape`, `size`), `relations` and `background` as in `truth`.
    """
    choices = combinations(split, rule)
    prompts = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        first: Combination = choices[index % len(choices)]
        scene = sample_scene(rng, width=64, height=64, objects=objects, choices=choices, first=first)
        prompts.append(Prompt(captions(scene)[0], _spec(scene), scene))
    return prompts


def _spec(scene: Scene) -> dict[str, Any]:
    return {
        "objects": [thing.combination._asdict() for thing in scene.objects],
        "relations": [list(relation) for relation in scene.relations],
        "background": scene.background,
    }


def _size(rng: np.random.Generator, options: ShapesOptions) -> tuple[int, int]:
    if options.continuous_aspects:
        low, high = np.log(min(options.aspects)), np.log(max(options.aspects))
        aspect = float(np.exp(rng.uniform(low, high)))
    else:
        aspect = options.aspects[int(rng.integers(len(options.aspects)))]
    long = options.resolution * max(aspect, 1 / aspect)
    rounded = max(options.resolution, round(long / options.multiple) * options.multiple)
    return (rounded, options.resolution) if aspect >= 1 else (options.resolution, rounded)


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise UserError with an option, its value and what to choose instead, unless the condition holds."""
    if not condition:
        raise UserError(f"is {value!r}", where=f"--{name.replace('_', '-')}", hint=f"choose {expected}")


_LONG_FORM = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def captions(scene: Scene) -> list[str]:
    """Return the captions of a scene, the plainest first.

    Example: "a large red circle left of a small blue star on a yellow background".
    """
    names = [noun_phrase(o.combination) for o in scene.objects]
    ground = f"{_article(scene.background)} {scene.background} background"
    if len(names) == 1:
        return _of_one(scene.objects[0].combination, scene.background, ground)
    relations = [relation for _, relation, _ in scene.relations]
    return _of_two(names, relations[0], ground) if len(names) == 2 else _of_three(names, relations, ground)


def noun_phrase(combination: Combination) -> str:
    """Return "a large red circle"."""
    return f"a {combination.size} {combination.colour} {combination.shape}"


def _of_one(what: Combination, background: str, ground: str) -> list[str]:
    return [
        f"{noun_phrase(what)} on {ground}",
        f"{ground} with {noun_phrase(what)}",
        f"one {what.colour} {what.shape} on {background}, {what.size}",
        f"{_article(what.colour)} {what.colour} {what.shape} that is {what.size}, on {ground}",
    ]


def _of_two(names: list[str], relation: str, ground: str) -> list[str]:
    first, second = names
    return [
        f"{first} {relation} {second} on {ground}",
        f"{second} {OPPOSITE[relation]} {first} on {ground}",
        f"{first} {_LONG_FORM[relation]} {second}, on {ground}",
        f"on {ground}, {first} {relation} {second}",
        f"{ground} with two objects: {first} {_LONG_FORM[relation]} {second}",
    ]


def _of_three(names: list[str], relations: list[str], ground: str) -> list[str]:
    first, second, third = names
    sideways, upright = relations
    return [
        f"{first} {sideways} {second} and {upright} {third} on {ground}",
        f"{first} {upright} {third} and {_LONG_FORM[sideways]} {second}, on {ground}",
        f"on {ground}, {second} {OPPOSITE[sideways]} {first}, and {third} {OPPOSITE[upright]} {first}",
        f"{ground} with three objects: {first} {sideways} {second} and {upright} {third}",
    ]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def build_shapes(
    folder: str | Path,
    *,
    count: int,
    aspects: Sequence[float] = (1.0,),
    objects: Mapping[int, float] | Sequence[int] = (1,),
    samples_per_shard: int = 1000,
    processes: int | None = None,
    **drawn: Any,
) -> Path:
    """Write `count` scenes into shards with an index under `folder`; return the folder.

    The other arguments are those of `ShapesOptions`; `objects` is a mapping from number to relative frequency
    or a list of equally likely numbers.

    Raises:
        UserError: an option is out of range, or the folder holds another build.
    """
    require(count >= 1, "count", count, "1 or more")
    weights = objects if isinstance(objects, Mapping) else dict.fromkeys(objects, 1.0)
    options = ShapesOptions(aspects=tuple(aspects), objects=tuple(sorted(weights.items())), **drawn)
    named = asdict(options)
    if options.held_out == FORMER_RULE:
        del named["held_out"]  # so that a build begun before there was a choice resumes
    build_shards(
        Path(folder),
        [Item(str(index)) for index in range(count)],
        partial(_sample, options),
        options={"source": "shapes", **named},
        samples_per_shard=samples_per_shard,
        processes=1 if count <= FEW_SCENES else processes,
        prefix="shapes",
    )
    return Path(folder)


def _sample(options: ShapesOptions, item: Item) -> Made:
    """Return a sample's encoded image, its plainest caption and its truth."""
    image, facts = make_image(options, int(item.name))
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, **ENCODINGS[options.encoding])
    return Made({options.encoding: encoded.getvalue(), "txt": facts["captions"][0], "json": facts})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build shapes`."""
    parser.add_argument("--out", required=True, help="folder for the shards and their index")
    parser.add_argument("--count", type=whole_number(1), default=10000, help="number of scenes (default %(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--resolution", type=int, default=64, help="short side in pixels (default %(default)s)")
    parser.add_argument(
        "--aspects", type=_numbers, default=(1.0,), metavar="A,B,…", help="ratios of width to height (default 1)"
    )
    parser.add_argument(
        "--continuous-aspects", action="store_true", help="draw ratios between the smallest and largest of --aspects"
    )
    parser.add_argument("--multiple", type=int, default=8, help="round the long side to this (default %(default)s)")
    parser.add_argument(
        "--objects",
        type=_frequencies,
        default={1: 1.0},
        metavar="1:P,2:P,3:P",
        help="objects per scene and their relative frequencies: 1:0.6,2:0.3,3:0.1, or 1,2,3 for equal ones (default 1)",
    )
    parser.add_argument("--split", choices=SPLITS, default="train", help="combinations shown (default %(default)s)")
    rule = "what train leaves out: pairs of color and shape (default), or triples: each pair in one size (older sets)"
    parser.add_argument("--held-out", choices=RULES, default="pairs", help=rule)
    parser.add_argument("--encoding", choices=tuple(ENCODINGS), default="webp", help="both lossless")
    parser.add_argument("--variation", type=float, default=1.0, help="0: easy, in fixed places; 1 (default): anywhere")
    parser.add_argument("--samples-per-shard", type=whole_number(1), default=1000)
    parser.add_argument("--processes", type=whole_number(1), help="default: one per core")


def run(args: argparse.Namespace) -> int:
    """Build from the arguments and print a one-line summary."""
    folder = build_shapes(args.out, **{name: value for name, value in vars(args).items() if name != "out"})
    print(f"{args.count} scenes, split {args.split}, short side {args.resolution} px: {folder}")
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.5,1,2, got {text!r}") from None


def _frequencies(text: str) -> dict[int, float]:
    pairs = (part.partition(":") for part in text.split(","))
    try:
        return {int(number): float(frequency or 1) for number, _, frequency in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected 1:0.6,2:0.4 or 1,2, got {text!r}") from None
