"""The words of the shapes set, and which colour–shape–size combinations training never sees."""

from itertools import product
from typing import Literal, NamedTuple

Split = Literal["train", "heldout", "all"]
SPLITS: tuple[Split, ...] = ("train", "heldout", "all")

# Any two differ clearly in hue or in luminance; all but three pairs may stand against each other.
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

# Euclidean distance in 8-bit RGB below which an edge between two colours would be hard to see.
MIN_CONTRAST = 120.0


class Combination(NamedTuple):
    """What an object is, apart from where it stands."""

    colour: str
    shape: str
    size: str


def is_held_out(combination: Combination) -> bool:
    """Tell whether training never sees this combination.

    16 of the 128 are held out, on two diagonals of the colour × shape table: each colour and each shape twice
    (once small, once large), each size eight times. Of no colour–shape pair are both sizes held out, so every
    pair is seen in the other size.
    """
    colour = list(COLOURS).index(combination.colour)
    shape = SHAPES.index(combination.shape)
    size = SIZES.index(combination.size)
    diagonal = (shape - colour) % len(SHAPES)
    return (diagonal == 3 and size == colour % 2) or (diagonal == 6 and size == (colour + 1) % 2)


def combinations(split: Split) -> list[Combination]:
    """List the combinations of a split, in a fixed order.

    Raises:
        ValueError: for a split that is not train, heldout or all.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    every = [Combination(*parts) for parts in product(COLOURS, SHAPES, SIZES)]
    return [c for c in every if split == "all" or is_held_out(c) == (split == "heldout")]


def backgrounds_for(colours: set[str]) -> list[str]:
    """List the background colours against which every one of `colours` stands out."""
    return [name for name in COLOURS if all(_contrast(name, colour) >= MIN_CONTRAST for colour in colours)]


def _contrast(one: str, other: str) -> float:
    return sum((a - b) ** 2 for a, b in zip(COLOURS[one], COLOURS[other], strict=True)) ** 0.5
