"""Scores images of shapes against what their prompts asked for, with chance levels and bootstrap intervals.

What was asked is a mapping as in the shapes set's `.json`: `objects` (each with colour, shape, size), `relations`
([subject, relation, object] by position in `objects`) and `background`; everything else is ignored.

How one image counts:

- One object asked: the largest object found is read; finding others costs nothing but the count.
- Several asked: each is paired with at most one of the four largest found, by the pairing with the most right
  colours, shapes and sizes (among equals, the one that prefers larger objects). An object without partner is wrong.
- `colour`, `shape`, `size`, `colour_and_shape`: one trial an object asked for.
- `relation`: one trial a relation asked for, right when both partners exist and stand so to each other.
- `count`, `background`: one trial an image. `everything`: an image in which all the others are right.

Chance is what a model would score that draws a right image for a prompt taken blindly from a set, all its prompts
equally likely: the mean over all pairs of a prompt asked and a prompt taken, computed, not sampled. The set is that of
the prompts asked, unless another is given as `blind`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.metrics.bootstrap import exact_reach
from hdm_lightning.metrics.shapes_reader import Reading, read_shapes

CRITERIA = ("colour", "shape", "size", "colour_and_shape", "relation", "count", "background", "everything")
MAX_PARTNERS = 4
RESAMPLES = 2000
CONFIDENCE = 0.95
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Spec = Mapping[str, Any]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """One criterion: right answers among trials, their share, its interval, and the share by chance."""

    right: int
    trials: int
    share: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Seen:
    """What an image shows, as far as prompts can ask: (colour, shape, size) of each object, largest first.

    `relations[i, j]` is where object i stands to object j.
    """

    objects: tuple[tuple[str | None, str | None, str | None], ...]
    relations: Mapping[tuple[int, int], str]
    background: str | None

    @classmethod
    def from_reading(cls, reading: Reading) -> "Seen":
        """Take over what the reader found."""
        found = range(len(reading.objects))
        return cls(
            tuple((o.colour, o.shape, o.size) for o in reading.objects),
            {(i, j): reading.relation(i, j) for i in found for j in found if i != j},
            reading.background,
        )

    @classmethod
    def from_spec(cls, spec: Spec) -> "Seen":
        """Describe an image that shows just what was asked for."""
        relations = {}
        for subject, relation, reference in spec.get("relations", ()):
            relations[subject, reference] = relation
            relations[reference, subject] = _OPPOSITE[relation]
        objects = tuple((o["colour"], o["shape"], o["size"]) for o in spec["objects"])
        return cls(objects, relations, spec["background"])


def score_images(specs: Sequence[Spec], images: Sequence[NDArray[np.uint8]], **options: Any) -> dict[str, Score]:
    """Read images, uint8 (H, W, 3) of any sizes from 32 pixels, and score them as `score_seen` does.

    Raises:
        ValueError: there is not one image for each of the specs, or none at all.
    """
    if len(specs) != len(images) or not specs:
        raise ValueError(f"{len(specs)} specs and {len(images)} images; expected as many of each, at least one")
    return score_seen(specs, [Seen.from_reading(read_shapes(image)) for image in images], **options)


def score_seen(
    specs: Sequence[Spec],
    seen: Sequence[Seen],
    *,
    blind: Sequence[Spec] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> dict[str, Score]:
    """Score what was seen against what was asked for, by criterion.

    Criteria without a trial (relations among single objects) are left out.

    Args:
        specs: what was asked for, one an image.
        seen: what the images show.
        blind: the prompts among which chance picks; None means `specs`.
        seed, resamples, confidence: of the percentile bootstrap over images (the exact bound where all agree).
    """
    counts = np.stack([grade(spec, sight) for spec, sight in zip(specs, seen, strict=True)])
    low, high = _intervals(counts, np.random.default_rng(seed), resamples, confidence)
    chance = chance_levels(specs, blind)
    return {
        name: Score(int(right), int(trials), right / trials, float(low[i]), float(high[i]), chance[name])
        for i, (name, (right, trials)) in enumerate(zip(CRITERIA, counts.sum(axis=0).tolist(), strict=True))
        if trials
    }


def chance_levels(specs: Sequence[Spec], blind: Sequence[Spec] | None = None) -> dict[str, float]:
    """Return each criterion's share for right images of prompts taken blindly from `blind` (None: from `specs`)."""
    asked, taken = _kinds(specs), _kinds(specs if blind is None else blind)
    counts = sum(grade(spec, Seen.from_spec(other)) * n * m for spec, n in asked for other, m in taken)
    return {
        name: float(right / trials)
        for name, (right, trials) in zip(CRITERIA, np.asarray(counts), strict=True)
        if trials
    }


def _kinds(specs: Sequence[Spec]) -> list[tuple[Spec, int]]:
    """Return the different specs, each with how often it occurs."""
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
    right = [[p is not None and wanted[k] == seen.objects[p][k] for wanted, p in pairs] for k in range(3)]
    trials = {
        **dict(zip(("colour", "shape", "size"), right, strict=True)),
        "colour_and_shape": [colour and shape for colour, shape in zip(right[0], right[1], strict=True)],
        "relation": [
            seen.relations.get((partners[subject], partners[reference])) == relation
            for subject, relation, reference in spec.get("relations", ())
        ],
        "count": [len(seen.objects) == len(asked)],
        "background": [seen.background == spec["background"]],
    }
    trials["everything"] = [all(map(all, trials.values()))]
    return np.array([[sum(trials[name]), len(trials[name])] for name in CRITERIA], dtype=np.int64)


def as_dict(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """Return scores as plain numbers for JSON."""
    return {name: asdict(score) for name, score in scores.items()}


def _pair(asked: Sequence[tuple], found: Sequence[tuple]) -> list[int | None]:
    """Return for each object asked for the position of its partner among those found, or None."""
    if len(asked) == 1:
        return [0 if found else None]
    candidates = list(range(min(len(found), MAX_PARTNERS)))
    places: list[int | None] = [*candidates, *[None] * max(0, len(asked) - len(candidates))]

    def right(partners: Sequence[int | None]) -> int:
        pairs = zip(asked, partners, strict=True)
        return sum(a == b for wanted, p in pairs if p is not None for a, b in zip(wanted, found[p], strict=True))

    # Permutations come in lexicographic order and max keeps the first: equals go to the larger objects.
    pairings = [list(pairing) for pairing in permutations(places, len(asked))]
    return max(pairings, key=right)


def _intervals(
    counts: Counts, rng: np.random.Generator, resamples: int, confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the percentile interval of right/trials of each criterion, resampling images.

    Where all images agree, the open end is the exact bound of a proportion among them.
    """
    images = len(counts)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    totals = np.tensordot(weights, counts, axes=1)
    shares = totals[..., 0] / np.maximum(totals[..., 1], 1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(shares, [tail, 1 - tail], axis=0)
    for i, (right, trials) in enumerate(counts.sum(axis=0)):
        asked = int((counts[:, i, 1] > 0).sum())
        if trials and right in (0, trials):
            reach = exact_reach(asked, confidence)
            low[i], high[i] = (1 - reach, 1.0) if right else (0.0, reach)
    return low, high
