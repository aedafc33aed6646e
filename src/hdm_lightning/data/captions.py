"""Captions: which of several, with which tags, in which order, or none at all.

The tag grammar is `kept ||| tag $$ tag %% tag $$ tag`: what stands before `|||` is kept in its place, groups are
parted by `%%` and tags by `$$`; groups and tags are shuffled and dropped. All separators can be chosen.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws
from hdm_lightning.errors import UserError

MAX_CAPTION_BYTES = 1 << 16
"""Longest caption that is read: putting Unicode in order can take time that grows with the square of the length."""

MAX_RECORD_BYTES = 4 << 20

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


@dataclass(frozen=True)
class CaptionRules:
    """How the caption of a sample is found and changed.

    Attributes:
        prefer: `txt` or `json`, where a sample has both.
        fields: keys of the JSON record that may hold a caption or a list of captions, first found first.
        drop: chance of an empty caption instead (for classifier-free guidance).
        tags: the tag grammar, or None to leave separators as they are.
        clean: normalize Unicode (NFC), drop control characters, collapse white space.
        allow_missing: a sample without a caption counts as one with an empty caption, not as bad.
    """

    prefer: str = "txt"
    fields: tuple[str, ...] = ("captions", "caption")
    drop: float = 0.1
    tags: TagGrammar | None = None
    clean: bool = True
    allow_missing: bool = False

    def __post_init__(self) -> None:
        if self.prefer not in ("txt", "json"):
            raise UserError(f"is {self.prefer!r}", where="data.captions.prefer", hint="give txt or json")
        require_share("data.captions.drop", self.drop)

    def choose(self, members: Mapping[str, bytes], draws: Draws) -> str:
        """One caption of the sample, before the chance of dropping it.

        Raises:
            SampleFault: there is none, or it is not UTF-8.
        """
        captions = self.all_of(members)
        if not captions:
            if self.allow_missing:
                return ""
            raise SampleFault("no caption")
        number = draws.weighted([weight for _, weight in captions]) if len(captions) > 1 else 0
        text = captions[number][0]
        if self.tags is not None and self.tags.is_used_in(text):
            text = self.tags.render(text, draws)
        return text

    def first(self, members: Mapping[str, bytes]) -> str:
        """The first caption with all its tags in their order: what validation uses."""
        captions = self.all_of(members)
        if not captions and not self.allow_missing:
            raise SampleFault("no caption")
        text = captions[0][0] if captions else ""
        return self.tags.render(text, None) if self.tags is not None and self.tags.is_used_in(text) else text

    def all_of(self, members: Mapping[str, bytes]) -> list[tuple[str, float]]:
        """All captions that are not empty, cleaned, with their weights.

        Raises:
            SampleFault: the record or the text cannot be read.
        """
        readers = {"txt": self._from_text, "json": self._from_record}
        order = ("json", "txt") if self.prefer == "json" else ("txt", "json")
        for name in order:
            found = readers[name](members[name]) if name in members else []
            cleaned = [(clean(text) if self.clean else _encodable(text), weight) for text, weight in found]
            cleaned = [(text, weight) for text, weight in cleaned if weight > 0 and not is_blank(text)]
            if cleaned:
                return cleaned
        return []

    def _from_text(self, data: bytes) -> list[tuple[str, float]]:
        _require_short(len(data))
        return [(text_of(data), 1.0)]

    def _from_record(self, data: bytes) -> list[tuple[str, float]]:
        record = parse_record(data)
        for name in self.fields:
            if record.get(name):
                return _weighted(record[name])
        return []


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


def _weighted(value: object) -> list[tuple[str, float]]:
    """Captions and weights of a string, or of a list of strings and `{"text", "weight"}` objects."""
    items: Sequence[object] = value if isinstance(value, list) else [value]
    captions = []
    for item in items:
        if isinstance(item, dict):
            text, weight = item.get("text"), item.get("weight", 1.0)
        else:
            text, weight = item, 1.0
        if text is None:
            continue
        if not isinstance(text, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise SampleFault("undecodable JSON record: a caption is no text")
        _require_short(len(text))
        try:
            captions.append((text, float(weight)))
        except OverflowError as error:
            raise SampleFault("undecodable JSON record: a weight beyond all numbers") from error
    return captions


def _require_short(size: int) -> None:
    if size > MAX_CAPTION_BYTES:
        raise SampleFault(f"caption too long: {size} bytes or letters")


def require_share(where: str, value: float) -> None:
    """Raise `UserError` for a chance that is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise UserError(f"is {value}", where=where, hint="give a share from 0 to 1")


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
