"""A filter, and its result for one shard: which samples break a rule, and hashes to find near copies by.

Rules are bounds on numbers, and values that a key must or must not have. A number is measured (sides, aspect ratio,
caption length) or read from the sample's record, such as the scores in COYO and LAION. Samples that cannot be compared
are counted separately.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.captions import CaptionRules, parse_record
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.sample_plan import PlannedShard
from hdm_lightning.data.sample_table import RawSample
from hdm_lightning.datasets.near_duplicates import perceptual_hash
from hdm_lightning.datasets.shard_work import samples_of
from hdm_lightning.errors import UserError
from hdm_lightning.json_files import typed

MEASURED: dict[str, Callable[["Seen"], float]] = {
    "width": lambda seen: seen.width,
    "height": lambda seen: seen.height,
    "short_side": lambda seen: min(seen.width, seen.height),
    "long_side": lambda seen: max(seen.width, seen.height),
    "aspect": lambda seen: max(seen.width, seen.height) / max(1, min(seen.width, seen.height)),
    "caption_words": lambda seen: len(seen.caption.split()),
    "caption_letters": lambda seen: len(seen.caption),
}
"""Measurements of a sample, whatever its record says: pixels, long over short side, words, characters."""

OF_SIZE = ("width", "height", "short_side", "long_side", "aspect")
"""Measurements that the index has, so that no sample is read."""

MOST_RULES = 60
MOST_KEYS = 40
"""Number of record keys to remember, to suggest one when no sample has the key of a rule."""

UNREADABLE = "cannot be read"
UNDECODABLE = "its image cannot be decoded, so it cannot be compared"
COPY = "near copy of a larger or earlier image"
COPY_OF_OTHERS = "near copy of an image of --against"
OWN_REASONS = (UNREADABLE, UNDECODABLE, COPY, COPY_OF_OTHERS)


class Seen(NamedTuple):
    """What rules are checked against: sides in pixels (0 if unknown), the first caption, the record."""

    width: int
    height: int
    caption: str = ""
    record: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Rule:
    """A condition on one key.

    Attributes:
        key: a measurement, or a key of the record; dots lead into objects (`scores.aesthetic`).
        least, most: bounds of its number, inclusive.
        among: values of which it must be one, in lower case; None for any.
        wanted: False if it must not be one of `among`.
    """

    key: str
    least: float = -inf
    most: float = inf
    among: tuple[str, ...] | None = field(default=None)
    wanted: bool = True

    @property
    def broken(self) -> str:
        """The reason reported for a sample that breaks the rule."""
        if self.among is not None:
            return f"{self.key} is {'not one of' if self.wanted else 'one of'} {', '.join(self.among)}"
        return f"{self.key} below {self.least:g}" if self.least > -inf else f"{self.key} above {self.most:g}"

    def keeps(self, seen: Seen) -> bool:
        """Return whether a sample keeps the rule.

        Raises:
            Lacking: the sample lacks what the rule is about.
        """
        if self.among is not None:
            return (_word(_found(self.key, seen.record)) in self.among) == self.wanted
        return self.least <= self._number(seen) <= self.most

    def _number(self, seen: Seen) -> float:
        if self.key not in MEASURED:
            return _number(self.key, _found(self.key, seen.record))
        if self.key in OF_SIZE and not min(seen.width, seen.height):
            raise Lacking(self.key)
        return MEASURED[self.key](seen)


class Lacking(Exception):
    """A sample lacks what a rule is about, or has something else than a number under its key."""

    def __init__(self, key: str, *, has_value: bool = False) -> None:
        super().__init__(f"{key} is not a number" if has_value else f"no {key}")
        self.has_value = has_value


def _found(key: str, record: Mapping[str, Any]) -> Any:
    value: Any = record
    for name in [key] if key in record else key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        raise Lacking(key)
    return value


def _number(key: str, value: Any) -> float:
    """Return a value, which may be text, as a number. Raises Lacking if it is not a finite number."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else inf
    except (ValueError, OverflowError):
        number = inf
    if not isfinite(number):
        raise Lacking(key, has_value=True)
    return number


def _word(value: Any) -> str:
    """Return a value as it is compared: text in lower case, JSON for other types."""
    return (value if isinstance(value, str) else json.dumps(value)).strip().lower()


def seen_of(members: Mapping[str, bytes], width: int, height: int, captions: CaptionRules) -> Seen:
    """Return what rules are checked against in a sample; an unreadable caption or record counts as missing."""
    caption, record = "", {}
    with suppress(SampleFault):
        caption = captions.first(members)
    with suppress(SampleFault, KeyError):
        record = parse_record(members["json"])
    return Seen(width, height, caption, record)


def are_of_size(rules: Sequence[Rule]) -> bool:
    """Return whether the index has everything that the rules need."""
    return all(rule.key in OF_SIZE and rule.among is None for rule in rules)


@dataclass(frozen=True)
class Filter:
    """Which samples of a set to keep.

    Attributes:
        rules: a sample is left out for the first one that it breaks.
        keep_lacking: keep samples that lack what a rule is about; otherwise they are left out.
        distance: most bits in which the perceptual hashes of near copies differ; None looks for none.
        captions: how to find the caption whose length is measured.
    """

    rules: tuple[Rule, ...] = ()
    keep_lacking: bool = False
    distance: int | None = None
    captions: CaptionRules = field(default_factory=CaptionRules)

    def __post_init__(self) -> None:
        if len(self.rules) > MOST_RULES:
            raise UserError(f"got {len(self.rules)} rules", where="--min, --max", hint=f"use at most {MOST_RULES}")


class Judged(NamedTuple):
    """The result for a shard's planned samples: uint8 (n,) codes, one plus the position in `Judgement.reasons`, 0 for
    those that stay; uint64 (n,) hashes and int64 (n,) pixel counts, if copies are looked for; how many samples have
    each key that a rule is about; how many stay although they lack it; and which keys the records have."""

    codes: NDArray[np.uint8]
    hashes: NDArray[np.uint64]
    pixels: NDArray[np.int64]
    having: dict[str, int]
    lacking: dict[str, int]
    keys: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        columns = {name: base64.b64encode(getattr(self, name).tobytes()).decode() for name in _COLUMNS}
        return {**self._asdict(), **columns}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Judged":
        """Return the inverse of `to_json`. Raises ValueError, KeyError or TypeError if `plain` is not from it."""
        codes, hashes, pixels = (np.frombuffer(base64.b64decode(plain[name]), kind) for name, kind in _COLUMNS.items())
        having, lacking = (typed(dict[str, int], plain[name]) for name in ("having", "lacking"))
        keys = typed(list[str], plain["keys"])
        if having is None or lacking is None or keys is None:
            raise ValueError("having, lacking or keys has the wrong type")
        return cls(codes, hashes, pixels, having, lacking, keys)

    def is_of(self, shard: PlannedShard, wanted: Filter) -> bool:
        """Return whether the columns can be those of a shard judged by a filter."""
        hashed = shard.samples if wanted.distance is not None else 0
        whole = (len(self.codes), len(self.hashes), len(self.pixels)) == (shard.samples, hashed, hashed)
        return whole and int(self.codes.max(initial=0)) <= len(reasons_of(wanted.rules))


_COLUMNS: dict[str, Any] = {"codes": np.uint8, "hashes": np.uint64, "pixels": np.int64}


def reasons_of(rules: Sequence[Rule]) -> list[str]:
    """Return the meaning of the codes from 1 on: three per rule, then the reasons outside the rules."""
    lacking = ((rule, Lacking(rule.key), Lacking(rule.key, has_value=True)) for rule in rules)
    return [*(reason for rule, *two in lacking for reason in (rule.broken, *map(str, two))), *OWN_REASONS]


def judged_shard(wanted: Filter, shard: PlannedShard) -> Judged:
    """Judge the samples of a shard. Raises UserError if it cannot be read."""
    height, width = shard.shapes()
    judge = _Judge(wanted, shard.samples)
    if wanted.distance is None and are_of_size(wanted.rules):
        for row, (high, wide) in enumerate(zip(height.tolist(), width.tolist(), strict=True)):
            judge.take(row, Seen(wide, high))
        return judge.found(height * width)
    for row, (_, sample) in enumerate(samples_of(shard)):
        if isinstance(sample, str):
            judge.refuse(row, UNREADABLE)
        else:
            judge.take(row, seen_of(sample.members, int(width[row]), int(height[row]), wanted.captions), sample)
    return judge.found(height * width)


class _Judge:
    """Collects the results for a shard's samples."""

    def __init__(self, wanted: Filter, samples: int) -> None:
        self.filter = wanted
        self.codes = np.zeros(samples, dtype=np.uint8)
        self.hashes = np.zeros(samples if wanted.distance is not None else 0, dtype=np.uint64)
        self.having: Counter[str] = Counter({rule.key: 0 for rule in wanted.rules})
        self.lacking: Counter[str] = Counter()
        self.keys: dict[str, None] = {}

    def take(self, row: int, seen: Seen, sample: RawSample | None = None) -> None:
        """Judge a sample by the rules and, if it keeps them and near copies are looked for, hash its image."""
        for name in seen.record if len(self.keys) < MOST_KEYS else ():
            self.keys[name[:80]] = None
        code, lacks = self._code(seen)
        self.codes[row] = code
        if code or self.filter.distance is None or sample is None:
            self.lacking.update(() if code else lacks)
            return
        try:
            self.hashes[row] = perceptual_hash(sample.image())
        except SampleFault:
            self.refuse(row, UNDECODABLE)
        else:
            self.lacking.update(lacks)

    def refuse(self, row: int, reason: str) -> None:
        """Leave a sample out for a reason outside the rules."""
        self.codes[row] = 1 + 3 * len(self.filter.rules) + OWN_REASONS.index(reason)

    def _code(self, seen: Seen) -> tuple[int, list[str]]:
        """Return the code of the first rule that a sample breaks, 0 for none, and what it lacks."""
        first, lacks = 0, []
        for number, rule in enumerate(self.filter.rules):
            try:
                kept, code = rule.keeps(seen), 1
                self.having[rule.key] += 1
            except Lacking as lacking:
                kept, code = self.filter.keep_lacking, 3 if lacking.has_value else 2
                lacks.append(str(lacking))
            if not kept and not first:
                first = 3 * number + code
        return first, lacks

    def found(self, pixels: NDArray[np.int64]) -> Judged:
        """Return the collected results."""
        wanted = pixels if self.filter.distance is not None else pixels[:0]
        return Judged(
            self.codes, self.hashes, wanted, dict(self.having), dict(self.lacking), list(self.keys)[:MOST_KEYS]
        )
