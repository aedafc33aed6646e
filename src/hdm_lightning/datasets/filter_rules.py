"""Rules by which samples are left out: bounds of numbers, and values that a key must or must not have.

A number is measured (sides, aspect, length of the caption) or stands in the sample's record, such as the scores that
COYO and LAION bring. What cannot be compared is counted apart.
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
"""What is measured of a sample, whatever its record says: pixels, long over short side, words, letters."""

OF_SIZE = ("width", "height", "short_side", "long_side", "aspect")
"""What the index knows, so that no sample is read."""

MOST_RULES = 60


class Seen(NamedTuple):
    """What rules look at: sides in pixels (0 where unknown), the first caption, the record."""

    width: int
    height: int
    caption: str = ""
    record: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Rule:
    """What a key must be.

    Attributes:
        key: of what is measured, or of the record; dots lead into objects (`scores.aesthetic`).
        least, most: bounds of its number, both allowed.
        among: values of which it must be one, in lower case; None for any.
        wanted: False where it must be none of `among`.
    """

    key: str
    least: float = -inf
    most: float = inf
    among: tuple[str, ...] | None = field(default=None)
    wanted: bool = True

    @property
    def broken(self) -> str:
        """What to say of a sample that breaks the rule."""
        if self.among is not None:
            return f"{self.key} is {'none of' if self.wanted else 'one of'} {', '.join(self.among)}"
        return f"{self.key} below {self.least:g}" if self.least > -inf else f"{self.key} above {self.most:g}"

    def keeps(self, seen: Seen) -> bool:
        """Whether a sample keeps the rule.

        Raises:
            Lacking: it has not what the rule is about.
        """
        if self.among is not None:
            return (_word(_found(self.key, seen.record)) in self.among) == self.wanted
        return self.least <= self._number(seen) <= self.most

    def _number(self, seen: Seen) -> float:
        if self.key not in MEASURED:
            return _number(self.key, _found(self.key, seen.record))
        if self.key in OF_SIZE and not min(seen.width, seen.height):
            raise Lacking(f"size unknown, for {self.key}")
        return MEASURED[self.key](seen)


class Lacking(Exception):
    """A sample has not what a rule is about; the message says what it lacks."""


def _found(key: str, record: Mapping[str, Any]) -> Any:
    value: Any = record
    for name in [key] if key in record else key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        raise Lacking(f"no {key}")
    return value


def _number(key: str, value: Any) -> float:
    """The number of a value, which may be written as a text. Raises Lacking: it is none, or not finite."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else inf
    except (ValueError, OverflowError):
        number = inf
    if not isfinite(number):
        raise Lacking(f"{key} is no number")
    return number


def _word(value: Any) -> str:
    """A value as it is compared: text in lower case, JSON for what is none."""
    return (value if isinstance(value, str) else json.dumps(value)).strip().lower()


def seen_of(members: Mapping[str, bytes], width: int, height: int, captions: CaptionRules) -> Seen:
    """What rules look at in a sample; a caption or record that cannot be read counts as none."""
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
    """Whether the index knows all that rules are about."""
    return all(rule.key in OF_SIZE and rule.among is None for rule in rules)
