"""Rules that decide which samples are left out: bounds on numbers, and values that a key must or must not have.

A number is measured (sides, aspect ratio, caption length) or read from the sample's record, such as the scores in
COYO and LAION. Samples that cannot be compared are counted separately.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, NamedTuple

from hdm_lightning.data.captions import CaptionRules, parse_record
from hdm_lightning.data.faults import SampleFault

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
    try:
        caption = captions.first(members)
    except SampleFault:
        caption = ""
    if "json" in members:
        try:
            record = parse_record(members["json"])
        except SampleFault:
            record = {}
    return Seen(width, height, caption, record)


def are_of_size(rules: Sequence[Rule]) -> bool:
    """Return whether the index has everything that the rules need."""
    return all(rule.key in OF_SIZE and rule.among is None for rule in rules)
