"""Scenes of the shapes dataset: which objects, how large and where, sampled so that every relation is unambiguous.

The vocabulary comes first, with the pairs of color and shape that training never sees. Lengths in this file are in
units of the image's short side; x points right, y points down.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "heldout", "all"]
SPLITS: tuple[Split, ...] = ("train", "heldout", "all")
HeldOut = Literal["pairs", "triples"]
RULES: tuple[HeldOut, ...] = ("pairs", "triples")
"""What training never sees: whole pairs of color and shape; or, in older sets, each pair in one size only."""

FORMER_RULE: HeldOut = "triples"
"""The rule of a sample or a build that names none."""

# Any two differ clearly in hue or in luminance; all but three pairs can be object and background.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 40),
    "green": (40, 160, 70),
    "blue": (40, 70, 210),
    "purple": (150, 50, 190),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
SIZES = ("small", "large")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)
_HELD_OUT_DIAGONALS = (3, 6)

# Euclidean distance in 8-bit RGB below which an edge between two colors would be hard to see.
MIN_CONTRAST = 120.0


class Combination(NamedTuple):
    """An object's properties apart from its position."""

    colour: str
    shape: str
    size: str


def is_held_out(combination: Combination, rule: HeldOut = "pairs") -> bool:
    """Return whether training never sees this combination.

    The pairs are those of two diagonals of the color × shape table: 16 of the 64, each color and each shape twice.

    - "pairs": in both sizes, 32 of the 128 combinations. A correct image shows that the model composes.
    - "triples": in one size only, 16 of the 128; each pair is seen in the other size, so that color and shape
      together do not test composition.
    """
    colour = list(COLOURS).index(combination.colour)
    shape = SHAPES.index(combination.shape)
    diagonal = (shape - colour) % len(SHAPES)
    if diagonal not in _HELD_OUT_DIAGONALS:
        return False
    # The size that is held out alternates along a diagonal, and differs between the two diagonals.
    held_size = SIZES[(colour + _HELD_OUT_DIAGONALS.index(diagonal)) % 2]
    return rule == "pairs" or combination.size == held_size


def combinations(split: Split, rule: HeldOut = "pairs") -> list[Combination]:
    """List the combinations of a split, in a fixed order.

    Raises:
        ValueError: the split is not train, heldout or all, or the rule is not pairs or triples.
    """
    for value, known in ((split, SPLITS), (rule, RULES)):
        if value not in known:
            raise ValueError(f"got {value!r}, expected one of {', '.join(known)}")
    every = [Combination(*parts) for parts in product(COLOURS, SHAPES, SIZES)]
    return [c for c in every if split == "all" or is_held_out(c, rule) == (split == "heldout")]


def backgrounds_for(colours: set[str]) -> list[str]:
    """List the background colors against which all of `colours` stand out."""
    return [name for name in COLOURS if all(_contrast(name, colour) >= MIN_CONTRAST for colour in colours)]


def _contrast(one: str, other: str) -> float:
    return sum((a - b) ** 2 for a, b in zip(COLOURS[one], COLOURS[other], strict=True)) ** 0.5


MARGIN, GAP = 0.04, 0.08
# Box side of an object alone and of one among others; "small" and "large" are far apart in either case.
DIAMETERS_ALONE = {"small": (0.36, 0.42), "large": (0.58, 0.72)}
DIAMETERS_AMONG = {"small": (0.24, 0.31), "large": (0.39, 0.42)}
# How far the second object may stray across the axis of the relation, as a fraction of the distance along it.
MAX_SLANT = 0.6
PLACEMENT_TRIES = 60

Point = tuple[float, float]
Relation = tuple[int, str, int]


@dataclass(frozen=True)
class SceneObject:
    """One object: its combination, the side of its box and the box's center, both in units of the short side."""

    combination: Combination
    diameter: float
    centre: Point


@dataclass(frozen=True)
class Scene:
    """A scene of `width` × `height` pixels; relations are (subject, relation, object) by position in `objects`."""

    width: int
    height: int
    background: str
    objects: tuple[SceneObject, ...]
    relations: tuple[Relation, ...]


def sample_scene(
    rng: np.random.Generator,
    *,
    width: int,
    height: int,
    objects: int,
    choices: list[Combination],
    first: Combination | None = None,
    variation: float = 1.0,
) -> Scene:
    """Sample a scene of one to three objects whose (color, shape) pairs differ, from the given combinations.

    Args:
        rng: the only source of randomness.
        width, height: the image's size in pixels.
        objects: how many, 1 to 3.
        choices: combinations to draw from, equally likely.
        first: the first object's combination, if it is fixed.
        variation: how far positions and sizes vary, from 0 (sizes at the top of their range, one object at the
            center, two at the middles of the halves) to 1 (as far as they can). It does not move three objects.
    """
    chosen = _choose(rng, objects, choices, first)
    background = str(rng.choice(backgrounds_for({c.colour for c in chosen})))
    short = min(width, height)
    ranges = DIAMETERS_ALONE if objects == 1 else DIAMETERS_AMONG
    drawn = [float(rng.uniform(*ranges[c.size])) for c in chosen]
    diameters = [_between(ranges[c.size][1], one, variation) for c, one in zip(chosen, drawn, strict=True)]
    extent = (width / short, height / short)
    centres, relations = _place(rng, diameters, extent)
    plain = _plain_places(extent, relations) if objects < 3 else centres
    centres = [
        (_between(p[0], c[0], variation), _between(p[1], c[1], variation)) for p, c in zip(plain, centres, strict=True)
    ]
    placed = tuple(SceneObject(*parts) for parts in zip(chosen, diameters, centres, strict=True))
    return Scene(width, height, background, placed, relations)


def pick_number(rng: np.random.Generator, proportions: Mapping[int, float]) -> int:
    """Draw a number of objects by relative frequency."""
    numbers = sorted(proportions)
    weights = np.array([proportions[n] for n in numbers], dtype=np.float64)
    return numbers[int(np.searchsorted(np.cumsum(weights / weights.sum())[:-1], rng.random(), side="right"))]


def _choose(
    rng: np.random.Generator, objects: int, choices: list[Combination], first: Combination | None
) -> list[Combination]:
    chosen = [first] if first is not None else []
    while len(chosen) < objects:
        candidate = choices[int(rng.integers(len(choices)))]
        if all(candidate[:2] != other[:2] for other in chosen):
            chosen.append(candidate)
    return chosen


def _place(rng: np.random.Generator, diameters: list[float], extent: Point) -> tuple[list[Point], tuple[Relation, ...]]:
    if len(diameters) == 1:
        side = diameters[0]
        return [(_anywhere(rng, extent[0], side), _anywhere(rng, extent[1], side))], ()
    if len(diameters) == 2:
        relation = RELATIONS[int(rng.integers(4))]
        return _place_pair(rng, diameters, extent, relation), ((0, relation, 1),)
    sideways, upright = RELATIONS[int(rng.integers(2))], RELATIONS[2 + int(rng.integers(2))]
    centres = _place_corner(rng, diameters, extent, sideways, upright)
    return centres, ((0, sideways, 1), (0, upright, 2))


def _plain_places(extent: Point, relations: tuple[Relation, ...]) -> list[Point]:
    """Return the center for one object, the middles of the halves for two.

    A point between these and any others that keep a relation and the gap keeps them too: both are linear.
    """
    x, y = extent[0] / 2, extent[1] / 2
    if not relations:
        return [(x, y)]
    relation = relations[0][1]
    near, far = _quarters(extent[0 if relation in ("left of", "right of") else 1], relation in ("right of", "below"))
    return [(near, y), (far, y)] if relation in ("left of", "right of") else [(x, near), (x, far)]


def _between(start: float, end: float, way: float) -> float:
    return start + way * (end - start)


def _place_pair(rng: np.random.Generator, diameters: list[float], extent: Point, relation: str) -> list[Point]:
    """Place two objects so that the first stands in `relation` to the second."""
    along = 0 if relation in ("left of", "right of") else 1
    ahead = relation in ("right of", "below")
    one, two = (diameters[1], diameters[0]) if ahead else (diameters[0], diameters[1])
    near, far = _in_line(rng, extent[along], one, two)
    near_across = _anywhere(rng, extent[1 - along], one)
    far_across = _beside(rng, extent[1 - along], two, near_across, far - near)
    points = [(near, near_across), (far, far_across)]
    if along == 1:
        points = [(across, place) for place, across in points]
    return points[::-1] if ahead else points


def _place_corner(
    rng: np.random.Generator, diameters: list[float], extent: Point, sideways: str, upright: str
) -> list[Point]:
    """Place a first object beside a second and above or below a third."""
    anchor, beside, stacked = diameters
    for _ in range(PLACEMENT_TRIES):
        row = _place_pair(rng, [anchor, beside], extent, sideways)
        column = _place_pair(rng, [anchor, stacked], extent, upright)
        # The anchor takes its x from the row and its y from the column; the others keep their offsets from it.
        (x, _), (_, y) = row[0], column[0]
        second = (row[1][0], y + row[1][1] - row[0][1])
        third = (x + column[1][0] - column[0][0], column[1][1])
        if _inside(second, beside, extent) and _inside(third, stacked, extent):
            clear = (beside + stacked) / 2 + GAP
            if max(abs(second[0] - third[0]), abs(second[1] - third[1])) >= clear:
                return [(x, y), second, third]
    x, other_x = _quarters(extent[0], OPPOSITE[sideways] == "left of")
    y, other_y = _quarters(extent[1], OPPOSITE[upright] == "above")
    return [(x, y), (other_x, y), (x, other_y)]


def _quarters(length: float, far: bool) -> Point:
    return (0.75 * length, 0.25 * length) if far else (0.25 * length, 0.75 * length)


def _anywhere(rng: np.random.Generator, length: float, side: float) -> float:
    return float(rng.uniform(MARGIN + side / 2, length - MARGIN - side / 2))


def _in_line(rng: np.random.Generator, length: float, one: float, two: float) -> Point:
    """Place two boxes one after the other with a gap, all such placements equally likely."""
    slack = length - 2 * MARGIN - GAP - one - two
    before, beyond = np.sort(rng.random(2)) * slack
    return float(MARGIN + before + one / 2), float(MARGIN + beyond + one + GAP + two / 2)


def _beside(rng: np.random.Generator, length: float, side: float, other: float, way: float) -> float:
    low = max(MARGIN + side / 2, other - MAX_SLANT * way)
    high = min(length - MARGIN - side / 2, other + MAX_SLANT * way)
    return float(rng.uniform(low, high))


def _inside(point: Point, side: float, extent: Point) -> bool:
    reach = MARGIN + side / 2 - 1e-9
    return all(reach <= place <= length - reach for place, length in zip(point, extent, strict=True))
