"""What a filter wants, and what is found of one shard by it: which samples break a rule, and hashes to compare."""

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
"""Keys of records that are remembered, to name where a rule finds its own nowhere."""

UNREADABLE = "cannot be read"
UNDECODABLE = "its image cannot be decoded, so that it cannot be compared"
COPY = "near copy of a larger or earlier image"
COPY_OF_OTHERS = "near copy of an image of --against"
OWN_REASONS = (UNREADABLE, UNDECODABLE, COPY, COPY_OF_OTHERS)


@dataclass(frozen=True)
class Filter:
    """What a set must keep.

    Attributes:
        rules: the first that a sample breaks counts.
        keep_lacking: a sample stays that has not what a rule is about; else it is left out.
        distance: bits in which the perceptual hashes of near copies differ at most; None looks for none.
        captions: how the caption is found whose length is measured.
    """

    rules: tuple[Rule, ...] = ()
    keep_lacking: bool = False
    distance: int | None = None
    captions: CaptionRules = field(default_factory=CaptionRules)

    def __post_init__(self) -> None:
        if len(self.rules) > MOST_RULES:
            raise UserError(f"{len(self.rules)} rules", where="--min, --max", hint=f"give {MOST_RULES} at most")


class Judged(NamedTuple):
    """What is found of a shard's planned samples: uint8 (n,) places in `Judgement.reasons` plus one, 0 for those that
    stay; uint64 (n,) hashes and int64 (n,) pixels where copies are looked for; how many have each key that a rule is
    about; how many stay though they lack it; and which keys records have."""

    codes: NDArray[np.uint8]
    hashes: NDArray[np.uint64]
    pixels: NDArray[np.int64]
    having: dict[str, int]
    lacking: dict[str, int]
    keys: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        columns = {name: base64.b64encode(getattr(self, name).tobytes()).decode() for name in _COLUMNS}
        return {**self._asdict(), **columns}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Judged":
        """What `to_json` gave. Raises ValueError, KeyError, TypeError: it is none."""
        codes, hashes, pixels = (np.frombuffer(base64.b64decode(plain[name]), kind) for name, kind in _COLUMNS.items())
        having, lacking = (typed(dict[str, int], plain[name]) for name in ("having", "lacking"))
        keys = typed(list[str], plain["keys"])
        if having is None or lacking is None or keys is None:
            raise ValueError("numbers by key, or keys, are others")
        return cls(codes, hashes, pixels, having, lacking, keys)

    def is_of(self, shard: PlannedShard, wanted: "Filter") -> bool:
        """Whether the columns can be those of a shard, judged by a filter."""
        hashed = shard.samples if wanted.distance is not None else 0
        whole = (len(self.codes), len(self.hashes), len(self.pixels)) == (shard.samples, hashed, hashed)
        return whole and int(self.codes.max(initial=0)) <= len(reasons_of(wanted.rules))


_COLUMNS: dict[str, Any] = {"codes": np.uint8, "hashes": np.uint64, "pixels": np.int64}


def reasons_of(rules: Sequence[Rule]) -> list[str]:
    """What codes from 1 on mean: three for each rule, then those of no rule."""
    of_rules = [reason for rule in rules for reason in (rule.broken, f"no {rule.key}", f"{rule.key} is no number")]
    return [*of_rules, *OWN_REASONS]


def judged_shard(wanted: Filter, shard: PlannedShard) -> Judged:
    """What is found of a shard. Raises UserError: it cannot be read."""
    height, width = shard.shapes()
    judge = _Judge(wanted, shard.samples)
    if wanted.distance is None and are_of_size(wanted.rules):
        for row, (high, wide) in enumerate(zip(height.tolist(), width.tolist(), strict=True)):
            judge.take(row, Seen(wide, high), b"")
        return judge.found(height * width)
    for row, sample in samples_of(LocalFiles(), shard):
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
    """Collects what is found of a shard's samples."""

    def __init__(self, wanted: Filter, samples: int) -> None:
        self.filter = wanted
        self.codes = np.zeros(samples, dtype=np.uint8)
        self.hashes = np.zeros(samples if wanted.distance is not None else 0, dtype=np.uint64)
        self.having: Counter[str] = Counter({rule.key: 0 for rule in wanted.rules})
        self.lacking: Counter[str] = Counter()
        self.keys: dict[str, None] = {}

    def take(self, row: int, seen: Seen, image: bytes) -> None:
        """Judge a sample by the rules and, where it keeps them, take the hash of its image."""
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
        """Leave a sample out for a reason of no rule."""
        self.codes[row] = _code_of(reason, len(self.filter.rules))

    def _code(self, seen: Seen) -> tuple[int, list[str]]:
        """The code of the first rule that a sample breaks, 0 for none; and what it lacks that is let pass."""
        first, lacks = 0, []
        for number, rule in enumerate(self.filter.rules):
            try:
                kept, code = rule.keeps(seen), 1
                self.having[rule.key] += 1
            except Lacking as lacking:
                kept, code = self.filter.keep_lacking, 3 if str(lacking).endswith("no number") else 2
                lacks.append(str(lacking))
            if not kept and not first:
                first = 3 * number + code
        return first, lacks

    def found(self, pixels: NDArray[np.int64]) -> Judged:
        """All that was found."""
        wanted = pixels if self.filter.distance is not None else pixels[:0]
        return Judged(
            self.codes, self.hashes, wanted, dict(self.having), dict(self.lacking), list(self.keys)[:MOST_KEYS]
        )


def _code_of(reason: str, rules: int) -> int:
    return 1 + 3 * rules + OWN_REASONS.index(reason)
