"""Score images of shapes against their prompts, with chance levels, and intervals over combinations.

A spec says what was asked for, as in the shapes set's `.json`: `objects` (each with colour, shape, size), `relations`
([subject, relation, object] by position in `objects`) and `background`; everything else is ignored.

How one image counts:

- One object asked for: the largest object found is graded; extra ones only cost the count.
- Several asked for: each is paired with at most one of the four largest found, by the pairing with the most right
  colors, shapes and sizes (ties go to larger objects). An object without a partner is wrong.
- `colour`, `shape`, `size`, `colour_and_shape`: one trial per object asked for. If several are asked for and more are
  found, none is right: an image with every color and shape in it would have them all.
- `placement`: one trial per relation asked for, right if both partners exist and are placed that way, whatever their
  colors and shapes.
- `relation_bound`: the same, and both partners have the right color and shape.
- `count`, `background`: one trial per image. `everything`: one trial per image, right if all the others are.

Chance is the score of a model that makes a right image for a prompt picked at random from those asked for, all
equally likely: the mean over all pairs of a prompt asked for and a prompt picked, computed, not sampled.

Intervals are over combinations (see `proportions`): prompts of the same one are right or wrong together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.metrics.bootstrap import Bootstrap, Estimate
from hdm_lightning.metrics.proportions import count_units, difference_interval
from hdm_lightning.metrics.shapes_reader import Reading, read_shapes

CRITERIA = (
    "colour",
    "shape",
    "size",
    "colour_and_shape",
    "placement",
    "relation_bound",
    "count",
    "background",
    "everything",
)
MAX_PARTNERS = 4
UNIT = ("colour", "shape")
"""Attributes in which objects of the same combination agree."""

_USUAL = Bootstrap()
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Spec = Mapping[str, Any]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Graded:
    """Scores image by image, for totals by combination or a comparison with another model's.

    Attributes:
        counts: (right, trials) of each image and criterion, int64 (N, criteria, 2), in the order of `CRITERIA`.
        units: the combinations that each image's prompt asks for.
        chance: chance level of each criterion that has a trial.
    """

    counts: Counts
    units: tuple[tuple[str, ...], ...]
    chance: Mapping[str, float]

    def estimates(self, intervals: Bootstrap = _USUAL) -> dict[str, Estimate]:
        """Return the share of each criterion that has a trial."""
        return {name: intervals.clustered_share(*self.outcomes(name), self.units) for name in self.chance}

    def outcomes(self, criterion: str) -> tuple[Counts, Counts]:
        """Return right answers (N,) and trials (N,) of one criterion."""
        column = self.counts[:, CRITERIA.index(criterion)]
        return column[:, 0], column[:, 1]

    def to_json(self) -> dict[str, Any]:
        """Return right answers and trials of each criterion and image, and the units, as plain values."""
        columns = {name: self.outcomes(name) for name in self.chance}
        return {
            "units": [list(each) for each in self.units],
            "right": {name: right.tolist() for name, (right, _) in columns.items()},
            "trials": {name: trials.tolist() for name, (_, trials) in columns.items()},
        }

    def scores(self, intervals: Bootstrap = _USUAL) -> dict[str, dict[str, float]]:
        """Return right answers, trials, share, interval, chance and number of combinations of each criterion."""
        found = {}
        for name, estimate in self.estimates(intervals).items():
            right, trials = self.outcomes(name)
            units = count_units([each for each, asked in zip(self.units, trials, strict=True) if asked])
            share = {"share": estimate.value, "low": estimate.low, "high": estimate.high}
            counts = {"right": int(right.sum()), "trials": int(trials.sum())}
            found[name] = {**counts, **share, "chance": float(self.chance[name]), "units": units}
        return found


@dataclass(frozen=True)
class Seen:
    """What an image shows, in the terms of a prompt: (color, shape, size) of each object, largest first.

    `relations[i, j]` is where object i is relative to object j.
    """

    objects: tuple[tuple[str | None, str | None, str | None], ...]
    relations: Mapping[tuple[int, int], str]
    background: str | None

    @classmethod
    def from_reading(cls, reading: Reading) -> "Seen":
        """Convert what the reader found."""
        found = range(len(reading.objects))
        return cls(
            tuple((o.colour, o.shape, o.size) for o in reading.objects),
            {(i, j): reading.relation(i, j) for i in found for j in found if i != j},
            reading.background,
        )

    @classmethod
    def from_spec(cls, spec: Spec) -> "Seen":
        """Describe an image that shows exactly what was asked for."""
        relations = {}
        for subject, relation, reference in spec.get("relations", ()):
            relations[subject, reference] = relation
            relations[reference, subject] = _OPPOSITE[relation]
        objects = tuple((o["colour"], o["shape"], o["size"]) for o in spec["objects"])
        return cls(objects, relations, spec["background"])


def grade_images(specs: Sequence[Spec], images: Sequence[NDArray[np.uint8]], *, unit: Sequence[str] = UNIT) -> Graded:
    """Read images, uint8 (H, W, 3) of any sizes from 32 pixels, and grade them as `grade_seen` does.

    Raises:
        ValueError: the numbers of specs and images differ, or are zero.
    """
    if len(specs) != len(images) or not specs:
        raise ValueError(f"{len(specs)} specs and {len(images)} images; expected equal numbers, at least one")
    return grade_seen(specs, [Seen.from_reading(read_shapes(image)) for image in images], unit=unit)


def grade_seen(specs: Sequence[Spec], seen: Sequence[Seen], *, unit: Sequence[str] = UNIT) -> Graded:
    """Grade what images show against what was asked for. Criteria without a trial have no chance level and no score.

    Args:
        specs: what was asked for, one per image.
        seen: what the images show.
        unit: attributes that tell combinations apart: color and shape, or size as well.
    """
    counts = np.stack([grade(spec, sight) for spec, sight in zip(specs, seen, strict=True)])
    units = tuple(tuple(" ".join(thing[part] for part in unit) for thing in spec["objects"]) for spec in specs)
    return Graded(counts, units, chance_levels(specs))


def chance_levels(specs: Sequence[Spec], blind: Sequence[Spec] | None = None) -> dict[str, float]:
    """Return each criterion's share for right images of prompts picked at random from `blind` (None: from `specs`)."""
    asked, taken = _kinds(specs), _kinds(specs if blind is None else blind)
    counts = sum(grade(spec, Seen.from_spec(other)) * n * m for spec, n in asked for other, m in taken)
    return {
        name: float(right / trials)
        for name, (right, trials) in zip(CRITERIA, np.asarray(counts), strict=True)
        if trials
    }


def _kinds(specs: Sequence[Spec]) -> list[tuple[Spec, int]]:
    """Return the different specs, each with its number of occurrences."""
    kinds: dict[str, tuple[Spec, int]] = {}
    for spec in specs:
        name = repr(Seen.from_spec(spec))
        kinds[name] = (spec, kinds.get(name, (spec, 0))[1] + 1)
    return list(kinds.values())


def grade(spec: Spec, seen: Seen) -> Counts:
    """Return (right, trials) of each criterion for one image: int64 (criteria, 2), in the order of `CRITERIA`."""
    asked = Seen.from_spec(spec).objects
    partners = _pair(asked, seen.objects)
    pairs = list(zip(asked, partners, strict=True))
    crowded = len(asked) > 1 and len(seen.objects) > len(asked)
    right = [
        [p is not None and not crowded and wanted[k] == seen.objects[p][k] for wanted, p in pairs] for k in range(3)
    ]
    both = [colour and shape for colour, shape in zip(right[0], right[1], strict=True)]
    placed = [
        (subject, reference, seen.relations.get((partners[subject], partners[reference])) == relation)
        for subject, relation, reference in spec.get("relations", ())
    ]
    trials = {
        **dict(zip(("colour", "shape", "size"), right, strict=True)),
        "colour_and_shape": both,
        "placement": [stands for _, _, stands in placed],
        "relation_bound": [stands and both[one] and both[other] for one, other, stands in placed],
        "count": [len(seen.objects) == len(asked)],
        "background": [seen.background == spec["background"]],
    }
    trials["everything"] = [all(map(all, trials.values()))]
    return np.array([[sum(trials[name]), len(trials[name])] for name in CRITERIA], dtype=np.int64)


def gap(seen: Estimate, unseen: Estimate) -> Estimate:
    """Return how much better combinations that training showed score than unseen ones, with its interval."""
    interval = difference_interval(seen.value, (seen.low, seen.high), unseen.value, (unseen.low, unseen.high))
    return Estimate(seen.value - unseen.value, *interval, min(seen.samples, unseen.samples), "Newcombe hybrid score")


def in_words(criterion: str) -> str:
    """Return the display name of a criterion."""
    return criterion.replace("_", " ").replace("colour", "color")


def _pair(asked: Sequence[tuple], found: Sequence[tuple]) -> list[int | None]:
    """Return for each object asked for the position of its partner among those found, or None."""
    if len(asked) == 1:
        return [0 if found else None]
    candidates = list(range(min(len(found), MAX_PARTNERS)))
    places: list[int | None] = [*candidates, *[None] * max(0, len(asked) - len(candidates))]

    def right(partners: Sequence[int | None]) -> int:
        pairs = zip(asked, partners, strict=True)
        return sum(a == b for wanted, p in pairs if p is not None for a, b in zip(wanted, found[p], strict=True))

    # Permutations come in lexicographic order and max keeps the first: ties go to the larger objects.
    pairings = [list(pairing) for pairing in permutations(places, len(asked))]
    return max(pairings, key=right)
