"""Caption choice and augmentation: one of several captions, shuffled and dropped tags, dropped captions.

The tag grammar is `kept ||| tag $$ tag %% tag $$ tag`: the text before `|||` always stays in front, groups are
separated by `%%` and tags by `$$`; groups and tags are shuffled and dropped. All separators are configurable.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeGuard

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

MAX_CAPTION_BYTES = 1 << 16
"""Longest caption that is read: normalizing Unicode can take time quadratic in the length."""

MAX_RECORD_BYTES = 4 << 20
MOST_WEIGHT = 1e9
"""Largest weight of a caption or a kind of captions: near the largest float, sums overflow and the last is drawn."""

LONGEST_RUN = 30
GRAPHEME_JOINER = "\u034f"
_UNSEEN = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10)))
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Byte order marks, UTF-32 first: one of its marks begins like one of UTF-16."""

_SPACE = re.compile(r"\s+")
# An underscore also ends a word: tags are written that way.
_SIDES = re.compile(
    r"(?<![^\W_])((left|right)(most|wards?|hand(ed)?)?|(counter|anti)?clockwise)(?![^\W_])", re.IGNORECASE
)


@dataclass(frozen=True)
class TagGrammar:
    """How a caption is split into a kept part, groups and tags, and how these are shuffled and dropped.

    Attributes:
        kept, group, tag: the separators.
        join: separator of the pieces in the result.
        shuffle: whether to shuffle the groups, and the tags within each group.
        group_drop: probability of dropping each group of a caption with two or more; a single group, such as
            comma-separated tags, is never dropped as a whole.
        tag_drop: probability of dropping each tag.
    """

    kept: str = "|||"
    group: str = "%%"
    tag: str = "$$"
    join: str = ", "
    shuffle: bool = True
    group_drop: float = 0.3
    tag_drop: float = 0.25

    def __post_init__(self) -> None:
        if not (self.kept and self.group and self.tag):
            hint = "set each of kept, group and tag to at least one character"
            raise UserError("a separator is empty", where="data.captions.tags", hint=hint)
        require_share("data.captions.tags.group_drop", self.group_drop)
        require_share("data.captions.tags.tag_drop", self.tag_drop)

    def is_used_in(self, text: str) -> bool:
        """Return whether a text contains any of the separators."""
        return self.kept in text or self.group in text or self.tag in text

    def parse(self, text: str) -> tuple[str, list[list[str]]]:
        """Return the kept part and the tags of each group, without empty ones."""
        before, found, after = text.partition(self.kept)
        kept, rest = (before.strip(), after) if found else ("", before)
        groups = [[tag.strip() for tag in group.split(self.tag)] for group in rest.split(self.group)]
        groups = [[tag for tag in group if tag] for group in groups]
        return kept, [group for group in groups if group]

    def render(self, text: str, draws: Draws | None) -> str:
        """Return the text with tags shuffled and dropped; with all tags in their order if `draws` is None."""
        kept, groups = self.parse(text)
        if draws is not None:
            alone = len(groups) == 1
            groups = [group for group in groups if draws.uniform() >= self.group_drop or alone]
            groups = [[tag for tag in group if draws.uniform() >= self.tag_drop] for group in groups]
            if self.shuffle:
                groups = draws.shuffled([draws.shuffled(group) for group in groups])
        pieces = [kept] if kept else []
        return self.join.join(pieces + [tag for group in groups for tag in group])


class Caption(NamedTuple):
    """One caption of a sample; its kind is `txt`, the key of the record, or the `kind` of its entry there."""

    text: str
    weight: float
    kind: str


@dataclass(frozen=True)
class CaptionRules:
    """How the caption of a sample is found and augmented.

    Attributes:
        prefer: `txt` or `json`, for samples that have both, unless `kinds` decides.
        fields: keys of the JSON record that may contain a caption or a list of captions; the first one present is used.
        kinds: weight of each kind of caption, relative to the other kinds that a sample has; None for `prefer` and
            `fields`, which also decide for a sample that has none of these kinds. A kind is `txt`, a key of the record,
            or the `kind` of a caption in a list of the record. A kind of weight 0 is never used.
        drop: probability of using an empty caption instead (for classifier-free guidance).
        tags: the tag grammar, or None to leave separators as they are.
        clean: normalize Unicode (NFC), drop control characters, collapse white space.
        allow_missing: treat a missing caption as an empty one instead of as a bad sample.
    """

    prefer: str = "txt"
    fields: tuple[str, ...] = ("captions", "caption")
    kinds: Mapping[str, float] | None = field(default=None, hash=False)  # not hashable
    drop: float = 0.1
    tags: TagGrammar | None = None
    clean: bool = True
    allow_missing: bool = False

    def __post_init__(self) -> None:
        if self.prefer not in ("txt", "json"):
            raise UserError(f"is {self.prefer!r}", where="data.captions.prefer", hint="set it to txt or json")
        require_share("data.captions.drop", self.drop)
        if self.kinds is not None:
            _require_weights(self.kinds, "data.captions.kinds")

    def choose(self, members: Mapping[str, bytes], draws: Draws) -> str:
        """Return one caption of the sample, before caption dropout.

        Raises:
            SampleFault: there is none, or it is not UTF-8.
        """
        captions = self._candidates(members)
        kinds = self._weights(captions)
        if len(kinds) > 1:
            chosen = list(kinds)[draws.weighted(list(kinds.values()))]
            captions = [each for each in captions if each.kind == chosen]
        if not captions:
            return self._without()
        number = draws.weighted([each.weight for each in captions]) if len(captions) > 1 else 0
        text = captions[number].text
        if self.tags is not None and self.tags.is_used_in(text):
            text = self.tags.render(text, draws)
        return text

    def first(self, members: Mapping[str, bytes]) -> str:
        """Return the first caption of the likeliest kind, with all its tags in their order; used by validation."""
        captions = self._candidates(members)
        if not captions:
            return self._without()
        kinds = self._weights(captions)
        likeliest = max(kinds, key=lambda kind: kinds[kind]) if kinds else captions[0].kind
        text = next(each.text for each in captions if each.kind == likeliest)
        return self.tags.render(text, None) if self.tags is not None and self.tags.is_used_in(text) else text

    def all_of(self, members: Mapping[str, bytes]) -> list[Caption]:
        """Return the cleaned, non-empty captions of the first place (text or record) that has any.

        Raises:
            SampleFault: the record or the text cannot be read.
        """
        readers = {"txt": self._from_text, "json": self._from_record}
        order = ("json", "txt") if self.prefer == "json" else ("txt", "json")
        for name in order:
            cleaned = self._cleaned(readers[name](members[name])) if name in members else []
            if cleaned:
                return cleaned
        return []

    def of_every_place(self, members: Mapping[str, bytes]) -> list[Caption]:
        """Return the cleaned, non-empty captions of the text and of every caption key of the record.

        A place that cannot be read is ignored if another one can.

        Raises:
            SampleFault: none can be read.
        """
        readers = {"txt": self._from_text, "json": self._from_every_key}
        present = [name for name in readers if name in members]
        return _readable(lambda name: self._cleaned(readers[name](members[name])), present)

    def _candidates(self, members: Mapping[str, bytes]) -> list[Caption]:
        """Return the captions to draw from: those of the wanted kinds, else those of kinds not in `kinds`."""
        if self.kinds is None:
            return self.all_of(members)
        wanted = [each for each in self.of_every_place(members) if self.kinds.get(each.kind)]
        return wanted or [each for each in self.all_of(members) if each.kind not in self.kinds]

    def _weights(self, captions: Sequence[Caption]) -> dict[str, float]:
        """Return the weights of the kinds present, sorted by name: the order in a file must not affect the draw."""
        there = {each.kind for each in captions}
        return {kind: weight for kind, weight in sorted((self.kinds or {}).items()) if weight and kind in there}

    def _without(self) -> str:
        if not self.allow_missing:
            raise SampleFault("no caption")
        return ""

    def _cleaned(self, found: Sequence[Caption]) -> list[Caption]:
        cleaned = [each._replace(text=clean(each.text) if self.clean else _encodable(each.text)) for each in found]
        return [each for each in cleaned if each.weight > 0 and not is_blank(each.text)]

    def _from_text(self, data: bytes) -> list[Caption]:
        _require_short(len(data))
        return [Caption(text_of(data), 1.0, "txt")]

    def _from_record(self, data: bytes) -> list[Caption]:
        record = parse_record(data)
        return next((captions_under(record[name], name) for name in self.fields if record.get(name)), [])

    def _from_every_key(self, data: bytes) -> list[Caption]:
        record, names = parse_record(data), dict.fromkeys((*self.fields, *(self.kinds or {})))
        return _readable(lambda name: captions_under(record[name], name), [name for name in names if record.get(name)])


def _readable(read: Callable[[str], list[Caption]], names: Iterable[str]) -> list[Caption]:
    """Return the captions of all names that can be read. Raises SampleFault: there are none, and one cannot be read."""
    found: list[Caption] = []
    faults: list[SampleFault] = []
    for name in names:
        try:
            found += read(name)
        except SampleFault as fault:
            faults.append(fault)
    if faults and not found:
        raise faults[0]
    return found


def parse_record(data: bytes) -> dict[str, object]:
    """Return the JSON object of a sample's record. Raises SampleFault: it is not a JSON object, or is too long."""
    if len(data) > MAX_RECORD_BYTES:
        raise SampleFault(f"record too long: {len(data)} bytes")
    try:
        record = json.loads(text_of(data))
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise SampleFault("undecodable JSON record") from error
    if not isinstance(record, dict):
        raise SampleFault("undecodable JSON record: not an object")
    return record


def captions_under(value: object, key: str) -> list[Caption]:
    """Return the captions under a key of a record: a string, or a list of strings and {"text", "weight", "kind"}.

    Raises:
        SampleFault: the value is something else, or a caption is too long.
    """
    items: Sequence[object] = value if isinstance(value, list) else [value]
    captions = []
    for item in items:
        text, weight, kind = item, 1.0, key
        if isinstance(item, dict):
            text, weight, kind = item.get("text"), item.get("weight", 1.0), item.get("kind") or key
        if text is None:
            continue
        if not isinstance(text, str):
            raise SampleFault("undecodable JSON record: a caption is not a string")
        if not is_weight(weight):
            told = in_one_line(str(weight))[:40]
            raise SampleFault(f"undecodable JSON record: a caption's weight is {told}, not 0 to {MOST_WEIGHT:g}")
        _require_short(len(text))
        captions.append(Caption(text, float(weight), str(kind)))
    return captions


def _require_short(size: int) -> None:
    if size > MAX_CAPTION_BYTES:
        raise SampleFault(f"caption too long: {size} bytes or characters")


def _require_weights(kinds: object, where: str) -> None:
    """Raise `UserError` unless `kinds` maps names to finite weights, at least one of them positive."""
    if not isinstance(kinds, Mapping):
        raise UserError(f"is {kinds!r}", where=where, hint="map names to numbers, as in {long: 0.7, txt: 0.3}")
    for kind, weight in kinds.items():
        if not is_weight(weight):
            raise UserError(
                f"is {str(weight)[:80]}", where=f"{where}.{kind}", hint=f"choose a value from 0 to {MOST_WEIGHT:g}"
            )
    if not any(kinds.values()):
        hint = f"give one a positive weight, or set {where}=null"
        raise UserError("no kind of caption has a positive weight", where=where, hint=hint)


def is_weight(value: object) -> TypeGuard[float]:
    """Return whether a value is a valid weight: a number from 0 to `MOST_WEIGHT`."""
    return _is_number(value) and 0 <= value <= MOST_WEIGHT


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_share(where: str, value: float) -> None:
    """Raise `UserError` unless the value is a number from 0 to 1."""
    if not (_is_number(value) and 0 <= value <= 1):
        raise UserError(f"is {str(value)[:80]}", where=where, hint="set it to a number from 0 to 1")


def clean(text: str) -> str:
    """Return a text in NFC, without control characters, with single spaces."""
    text = _SPACE.sub(" ", text)
    if not text.isprintable():
        text = "".join(letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cs"))
    if not text.isascii():
        text = unicodedata.normalize("NFC", _stream_safe(text))
    return _SPACE.sub(" ", text).strip()


def is_blank(text: str) -> bool:
    """Return whether a text has no visible characters: only spaces, joiners, fillers."""
    return all(
        letter.isspace() or letter in _UNSEEN or unicodedata.category(letter) in ("Cf", "Cc", "Cs") for letter in text
    )


def _stream_safe(text: str) -> str:
    """Return the text with joiners in runs of more than thirty combining marks (UAX 15, Stream-Safe Text Format).

    Normalization sorts each run, in time quadratic in its length; no language has such runs.
    """
    # A run of 31 marks covers one of the positions 30, 61, 92, …
    if not any(map(unicodedata.combining, text[LONGEST_RUN :: LONGEST_RUN + 1])):
        return text
    pieces, run = [], 0
    for letter in text:
        run = run + 1 if unicodedata.combining(letter) else 0
        if run > LONGEST_RUN:
            pieces.append(GRAPHEME_JOINER)
            run = 1
        pieces.append(letter)
    return "".join(pieces)


def names_a_side(text: str) -> bool:
    """Return whether a caption mentions left or right, so its image must not be mirrored."""
    return _SIDES.search(text) is not None


def _encodable(text: str) -> str:
    """Return the text, or raise `SampleFault` for lone surrogates (from JSON escapes), on which tokenizers fail."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleFault("caption is not UTF-8") from error
    return text


def text_of(data: bytes) -> str:
    """Decode a caption or record: UTF-8, or UTF-16 and UTF-32 as recognized by a byte order mark or zero bytes.

    Raises:
        SampleFault: the encoding is another one.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark) or _unmarked(data)
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        raise SampleFault(f"caption is not {encoding.upper()}: byte {data[place]:#04x} at {place}") from error


def _unmarked(data: bytes) -> str:
    """Guess the encoding of unmarked bytes: Latin text in UTF-16 has a zero in most pairs, always on the same side."""
    pairs = len(data) // 2
    if len(data) % 2 or b"\0" not in data:
        return "utf-8"
    first, second = data[::2].count(0), data[1::2].count(0)
    if min(first, second) or 2 * max(first, second) <= pairs:
        return "utf-8"
    return "utf-16-le" if second else "utf-16-be"
