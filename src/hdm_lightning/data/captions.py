"""Captions: which of several, with which tags, in which order, or none at all.

The tag grammar is `kept ||| tag $$ tag %% tag $$ tag`: what stands before `|||` is kept in its place, groups are
parted by `%%` and tags by `$$`; groups and tags are shuffled and dropped. All separators can be chosen.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeGuard

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

MAX_CAPTION_BYTES = 1 << 16
"""Longest caption that is read: putting Unicode in order can take time that grows with the square of the length."""

MAX_RECORD_BYTES = 4 << 20
MOST_WEIGHT = 1e9
"""Of a kind of captions and of a caption; sums of what is near the largest number are infinite, and draw the last."""

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
"""Byte order marks; those of UTF-32 begin like those of UTF-16."""

_SPACE = re.compile(r"\s+")
# A word ends at an underscore, too: tags are written that way.
_SIDES = re.compile(
    r"(?<![^\W_])((left|right)(most|wards?|hand(ed)?)?|(counter|anti)?clockwise)(?![^\W_])", re.IGNORECASE
)


@dataclass(frozen=True)
class TagGrammar:
    """How a caption is parted into a kept part, groups and tags, and what becomes of them.

    Attributes:
        kept, group, tag: the separators.
        join: what stands between the pieces in the end.
        shuffle: whether groups, and tags within a group, change places.
        group_drop: chance of each group to be left out, where a caption has two or more: comma-separated tags are one
            group, and a caption is not to lose all of them at once.
        tag_drop: chance of each tag to be left out.
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
            hint = "give each of kept, group and tag at least one character"
            raise UserError("a separator is empty", where="data.captions.tags", hint=hint)
        require_share("data.captions.tags.group_drop", self.group_drop)
        require_share("data.captions.tags.tag_drop", self.tag_drop)

    def is_used_in(self, text: str) -> bool:
        """Whether a text has any of the separators."""
        return self.kept in text or self.group in text or self.tag in text

    def parse(self, text: str) -> tuple[str, list[list[str]]]:
        """The kept part and the tags of each group, without empty ones."""
        before, found, after = text.partition(self.kept)
        kept, rest = (before.strip(), after) if found else ("", before)
        groups = [[tag.strip() for tag in group.split(self.tag)] for group in rest.split(self.group)]
        groups = [[tag for tag in group if tag] for group in groups]
        return kept, [group for group in groups if group]

    def render(self, text: str, draws: Draws | None) -> str:
        """The text with its tags shuffled and dropped, or all of them in their order where `draws` is None."""
        kept, groups = self.parse(text)
        if draws is not None:
            alone = len(groups) == 1
            groups = [group for group in groups if draws.uniform() >= self.group_drop or alone]
            groups = [[tag for tag in group if draws.uniform() >= self.tag_drop] for group in groups]
            if self.shuffle:
                groups = draws.shuffled([draws.shuffled(group) for group in groups])
        pieces = [kept] if kept else []
        return self.join.join(pieces + [tag for group in groups for tag in group])


TEXT_KIND = "txt"
"""Kind of the caption in the member of that name."""


class Caption(NamedTuple):
    """One caption of a sample: `txt`, the record's key that holds it, or what its entry says is its kind."""

    text: str
    weight: float
    kind: str


@dataclass(frozen=True)
class CaptionRules:
    """How the caption of a sample is found and changed.

    Attributes:
        prefer: `txt` or `json`, where a sample has both and `kinds` does not decide.
        fields: keys of the JSON record that may hold a caption or a list of captions, first found first.
        kinds: chance of each kind of caption, relative to the other kinds that a sample has; None for `prefer` and
            `fields`, which also decide for a sample that has none of these kinds. A kind is `txt`, a key of the record,
            or what a caption in a list of the record says as its `kind`. One of weight 0 is never used.
        drop: chance of an empty caption instead (for classifier-free guidance).
        tags: the tag grammar, or None to leave separators as they are.
        clean: normalize Unicode (NFC), drop control characters, collapse white space.
        allow_missing: a sample without a caption counts as one with an empty caption, not as bad.
    """

    prefer: str = "txt"
    fields: tuple[str, ...] = ("captions", "caption")
    kinds: Mapping[str, float] | None = field(default=None, hash=False)  # a mapping has none
    drop: float = 0.1
    tags: TagGrammar | None = None
    clean: bool = True
    allow_missing: bool = False

    def __post_init__(self) -> None:
        if self.prefer not in ("txt", "json"):
            raise UserError(f"is {self.prefer!r}", where="data.captions.prefer", hint="give txt or json")
        require_share("data.captions.drop", self.drop)
        if self.kinds is not None:
            _require_weights(self.kinds, "data.captions.kinds")

    def choose(self, members: Mapping[str, bytes], draws: Draws) -> str:
        """One caption of the sample, before the chance of dropping it.

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
        """The first caption, of the likeliest kind, with all its tags in their order: what validation uses."""
        captions = self._candidates(members)
        if not captions:
            return self._without()
        kinds = self._weights(captions)
        likeliest = max(kinds, key=lambda kind: kinds[kind]) if kinds else captions[0].kind
        text = next(each.text for each in captions if each.kind == likeliest)
        return self.tags.render(text, None) if self.tags is not None and self.tags.is_used_in(text) else text

    def all_of(self, members: Mapping[str, bytes]) -> list[Caption]:
        """All captions that are not empty, cleaned, of the first place that has any.

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
        """All captions that are not empty, cleaned, of the text and of every key of the record that may hold some.

        A place that cannot be read counts for nothing beside one that can.

        Raises:
            SampleFault: none can be read.
        """
        found: list[Caption] = []
        faults: list[SampleFault] = []
        for name, read in (("txt", self._from_text), ("json", self._from_every_key)):
            try:
                found += self._cleaned(read(members[name])) if name in members else []
            except SampleFault as fault:
                faults.append(fault)
        if faults and not found:
            raise faults[0]
        return found

    def _candidates(self, members: Mapping[str, bytes]) -> list[Caption]:
        """What is drawn from: captions of the kinds that are wanted; where there are none, of kinds not mentioned."""
        if self.kinds is None:
            return self.all_of(members)
        wanted = [each for each in self.of_every_place(members) if self.kinds.get(each.kind)]
        return wanted or [each for each in self.all_of(members) if each.kind not in self.kinds]

    def _weights(self, captions: Sequence[Caption]) -> dict[str, float]:
        """Weights of the kinds that are there, by name: their order in a file must not decide what is drawn."""
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
        return [Caption(text_of(data), 1.0, TEXT_KIND)]

    def _from_record(self, data: bytes) -> list[Caption]:
        record = parse_record(data)
        return next((captions_under(record[name], name) for name in self.fields if record.get(name)), [])

    def _from_every_key(self, data: bytes) -> list[Caption]:
        """Of all keys that may hold some; one that cannot be read counts for nothing beside one that can."""
        record, found = parse_record(data), []
        faults: list[SampleFault] = []
        for name in dict.fromkeys((*self.fields, *(self.kinds or {}))):
            try:
                found += captions_under(record[name], name) if record.get(name) else []
            except SampleFault as fault:
                faults.append(fault)
        if faults and not found:
            raise faults[0]
        return found


def parse_record(data: bytes) -> dict[str, object]:
    """The JSON object of a sample's record.

    Raises:
        SampleFault: it is none, or too long to be read.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise SampleFault(f"record too long: {len(data)} bytes")
    try:
        record = json.loads(text_of(data))
    except (ValueError, RecursionError) as error:  # brackets nested by the thousand
        raise SampleFault("undecodable JSON record") from error
    if not isinstance(record, dict):
        raise SampleFault("undecodable JSON record: not an object")
    return record


def captions_under(value: object, key: str) -> list[Caption]:
    """Captions of a string, or of a list of strings and `{"text", "weight", "kind"}` objects, under a key of a record.

    Raises:
        SampleFault: it is something else, or one is too long to be read.
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
            raise SampleFault("undecodable JSON record: a caption is no text")
        if not is_weight(weight):
            told = in_one_line(str(weight))[:40]
            raise SampleFault(f"undecodable JSON record: a caption's weight is {told}, not 0 to {MOST_WEIGHT:g}")
        _require_short(len(text))
        captions.append(Caption(text, float(weight), str(kind)))
    return captions


def _require_short(size: int) -> None:
    if size > MAX_CAPTION_BYTES:
        raise SampleFault(f"caption too long: {size} bytes or letters")


def _require_weights(kinds: object, where: str) -> None:
    """Raise `UserError` for anything but names with finite weights, one of which is positive."""
    if not isinstance(kinds, Mapping):
        raise UserError(f"is {kinds!r}", where=where, hint="give names with numbers, {long: 0.7, txt: 0.3}")
    for kind, weight in kinds.items():
        if not is_weight(weight):
            raise UserError(
                f"is {str(weight)[:80]}", where=f"{where}.{kind}", hint=f"give 0 or more, up to {MOST_WEIGHT:g}"
            )
    if not any(kinds.values()):
        hint = f"give one a positive weight, or {where}=null"
        raise UserError("no kind of caption has a positive weight", where=where, hint=hint)


def is_weight(value: object) -> TypeGuard[float]:
    """Whether it is a number that weights can be: not NaN, not infinite, not below 0."""
    return _is_number(value) and 0 <= value <= MOST_WEIGHT


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_share(where: str, value: float) -> None:
    """Raise `UserError` for what is no chance, from 0 to 1."""
    if not (_is_number(value) and 0 <= value <= 1):
        raise UserError(f"is {str(value)[:80]}", where=where, hint="give a share from 0 to 1")


def clean(text: str) -> str:
    """NFC, no control characters, single spaces."""
    text = _SPACE.sub(" ", text)
    if not text.isprintable():
        text = "".join(letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cs"))
    if not text.isascii():
        text = unicodedata.normalize("NFC", _stream_safe(text))
    return _SPACE.sub(" ", text).strip()


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: spaces, joiners, fillers."""
    return all(
        letter.isspace() or letter in _UNSEEN or unicodedata.category(letter) in ("Cf", "Cc", "Cs") for letter in text
    )


def _stream_safe(text: str) -> str:
    """The text with a joiner in runs of more than thirty marks on one letter (UAX 15, Stream-Safe Text Format).

    Normalization sorts each run, in time that grows with the square of its length; no language has such runs.
    """
    if len(text) < LONGEST_RUN or not _longest_run_is_beyond(text):
        return text
    pieces, run = [], 0
    for letter in text:
        run = run + 1 if unicodedata.combining(letter) else 0
        if run > LONGEST_RUN:
            pieces.append(GRAPHEME_JOINER)
            run = 1
        pieces.append(letter)
    return "".join(pieces)


def _longest_run_is_beyond(text: str) -> bool:
    # A run of thirty-one marks holds a mark at some multiple of thirty-one.
    step = LONGEST_RUN + 1
    return any(unicodedata.combining(letter) for letter in text[LONGEST_RUN::step])


def names_a_side(text: str) -> bool:
    """Whether a caption says left or right, so that its image must not be mirrored."""
    return _SIDES.search(text) is not None


def _encodable(text: str) -> str:
    """The text, unless it holds half a surrogate pair, as an escape in a JSON record can: tokenizers break on those."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleFault("caption is not UTF-8") from error
    return text


def text_of(data: bytes) -> str:
    """The text of a caption or record: UTF-8, or UTF-16 and UTF-32 where a mark or their zeros tell.

    Raises:
        SampleFault: it is another encoding.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark) or _unmarked(data)
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = error.start + len(mark)
        raise SampleFault(f"caption is not {encoding.upper()}: byte {data[place]:#04x} at {place}") from error


def _unmarked(data: bytes) -> str:
    """UTF-16 without its mark has a zero in most pairs of a Latin text, always on the same side."""
    pairs = len(data) // 2
    if len(data) % 2 or b"\0" not in data:
        return "utf-8"
    first, second = data[::2].count(0), data[1::2].count(0)
    if min(first, second) or 2 * max(first, second) <= pairs:
        return "utf-8"
    return "utf-16-le" if second else "utf-16-be"
