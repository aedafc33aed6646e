"""A filter, and its result for one shard: which samples break a rule, and hashes to compare."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.reader import LocalFiles
from hdm_lightning.data.sample_plan import PlannedShard
from hdm_lightning.datasets.filter_rules import MOST_RULES, Lacking, Rule, Seen, are_of_size, seen_of
from hdm_lightning.datasets.near_duplicates import perceptual_hash
from hdm_lightning.datasets.shard_work import samples_of
from hdm_lightning.errors import UserError
from hdm_lightning.json_files import typed

MOST_KEYS = 40
"""Number of record keys to remember, to suggest one when no sample has the key of a rule."""

UNREADABLE = "cannot be read"
UNDECODABLE = "its image cannot be decoded, so it cannot be compared"
COPY = "near copy of a larger or earlier image"
COPY_OF_OTHERS = "near copy of an image of --against"
OWN_REASONS = (UNREADABLE, UNDECODABLE, COPY, COPY_OF_OTHERS)


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

    def is_of(self, shard: PlannedShard, wanted: "Filter") -> bool:
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
            judge.take(row, Seen(wide, high), b"")
        return judge.found(height * width)
    for row, (_, sample) in enumerate(samples_of(LocalFiles(), shard)):
        if isinstance(sample, str):
            judge.refuse(row, UNREADABLE)
            continue
        seen = seen_of(sample.members, int(width[row]), int(height[row]), wanted.captions)
        image = b""
        if wanted.distance is not None:
            try:
                image = sample.image()
            except SampleFault:
                image = b""
        judge.take(row, seen, image)
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

    def take(self, row: int, seen: Seen, image: bytes) -> None:
        """Judge a sample by the rules and, if it keeps them, hash its image."""
        for name in seen.record if len(self.keys) < MOST_KEYS else ():
            self.keys[name[:80]] = None
        code, lacks = self._code(seen)
        self.codes[row] = code
        if code or self.filter.distance is None:
            self.lacking.update(() if code else lacks)
            return
        try:
            self.hashes[row] = perceptual_hash(image)
        except SampleFault:
            self.refuse(row, UNDECODABLE)
        else:
            self.lacking.update(lacks)

    def refuse(self, row: int, reason: str) -> None:
        """Leave a sample out for a reason outside the rules."""
        self.codes[row] = _code_of(reason, len(self.filter.rules))

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


def _code_of(reason: str, rules: int) -> int:
    return 1 + 3 * rules + OWN_REASONS.index(reason)
