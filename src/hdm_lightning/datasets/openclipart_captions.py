"""Make captions from a drawing's title, keywords and description, leaving out text that does not describe the image."""

import html
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from hdm_lightning.datasets.openclipart_source import Record

MAX_KEYWORDS = 6
MAX_DESCRIPTION_CHARACTERS = 300

# Titles that name a collection, an author or a wrong member of a series; the file name is more informative.
_COLLECTION_TITLE = re.compile(
    r"clip ?arts?\b|collection|theme|aiga|iconset|^etiquette icons|road ?signs|submission|sibmission|^sallite$"
    r"|^australian maps|^map symbols|^simple arrows|^advertising|^(untitled|unnamed|drawing|new document)\b|^none$",
    re.IGNORECASE,
)
_COLLECTION_SUFFIX = re.compile(r"\s+-\s+(rpg map elements|body part|clothing)$", re.IGNORECASE)
_NOT_A_DESCRIPTION = re.compile(
    r"https?:|www\.|@|public domain|copyright|licen[cs]e|converted|collection|inkscape|contact|submi|clip ?art|svg",
    re.IGNORECASE,
)
_NOT_A_KEYWORD = {
    *("hash", "unsorted", "clipart", "clip art", "misc", "special", "various", "other", "image", "svg", "none"),
    *("menu", "mapsym", "networksym", "arrowshape", "signs and symbols", "united nations member", "0-en"),
}
# Numbers, addresses, and keywords run together.
_NOT_A_WORD = re.compile(r"\d{3}|0x|://|\S{20}")
_FOLDER_NOT_A_KEYWORD = {"unsorted", "duplicates", "special", "shapes", "miscellany", "mixed", "signs and symbols"}
_PARTED = {
    "roadsign": "road sign",
    "signalflag": "signal flag",
    "unitedstates": "united states",
    "icecream": "ice cream",
    "bodypart": "body part",
}
# Tokens of file names that stem from the original collections.
_NOT_IN_A_NAME = {"aiga", "nps", "bw", "bwh", "bn", "the"}
_CARD = re.compile(r"^(?:simple|white|bordered|ornamental)_(?:([cdhs])_(10|[2-9ajqk])|jk_[br])$")
_SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
_RANKS = dict(
    zip(
        ("a", "2", "3", "4", "5", "6", "7", "8", "9", "10", "j", "q", "k"),
        ["ace", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "jack", "queen", "king"],
        strict=True,
    )
)


@dataclass(frozen=True)
class Description:
    """The text that describes a drawing.

    Attributes:
        title: the drawing's own title, or else one made from its file name; may be empty.
        keywords: at most six, none of them contained in the title.
        captions: title with keywords, title, and the description if it is a sentence; the first is the fullest.
        named: whether title and keywords are the author's, not guessed from file and folder names.
    """

    title: str
    keywords: tuple[str, ...]
    captions: tuple[str, ...]
    named: bool


def describe(record: Record) -> Description:
    """Return the title, keywords and captions of a record."""
    own_title = _card_title(record) or clean_title(record.title, record.author)
    title = own_title or title_from_path(record)
    own_keywords = clean_keywords(record, title)
    keywords = _merge(own_keywords, _folder_words(record, title))[:MAX_KEYWORDS]
    captions = [", ".join([title, *keywords] if title else keywords)]
    if title and keywords:
        captions.append(title)
    if sentence := clean_description(record.description, title):
        captions.append(sentence)
    return Description(title, keywords, tuple(c for c in captions if c), bool(own_title) and bool(own_keywords))


def clean_title(title: str, author: str = "") -> str:
    """Return a title as plain words, or "" if it names a collection, the author or nothing at all."""
    text = re.sub(r"^svg\s+", "", _words(title), flags=re.IGNORECASE)
    text = _COLLECTION_SUFFIX.sub("", text)
    text = re.sub(r"\(?\b(?:b ?(?:and|&) ?w|bw)\b\)?", "black and white", text, flags=re.IGNORECASE)
    text = re.sub(r"\.(svg|png|eps)$|[\s(#]+\d+\)?$|(?<=[a-z]{3})#?\d+$", "", text).strip(" -,.:")
    text = _without_author(text, author)
    return "" if _COLLECTION_TITLE.search(text) or not _has_word(text) else text


def title_from_path(record: Record) -> str:
    """Return the words of the file name, without numbers and the author's name."""
    author = _tokens(record.author)
    stem = _part_camel_case(PurePosixPath(record.path).stem)
    # File names are truncated, so the last word of the author's name may be cut short.
    kept = [
        token
        for token in re.findall(r"[a-z]{2,}", stem.lower())
        if token not in _NOT_IN_A_NAME and not any(part.startswith(token) for part in author)
    ]
    text = " ".join(kept)
    return text if _has_word(text) else ""


def clean_keywords(record: Record, title: str) -> tuple[str, ...]:
    """Return the author's keywords that are informative and not already in the title."""
    author = record.author.lower()
    keywords: list[str] = []
    for raw in record.keywords:
        word = _words(raw).lower()
        word = _PARTED.get(word, word)
        # "eiffeltower" adds nothing to "Eiffel Tower".
        in_title = re.search(rf"\b{re.escape(word)}\b", title.lower()) or word == title.lower().replace(" ", "")
        known = word in _NOT_A_KEYWORD or word in keywords or in_title
        if not known and word not in author and _has_word(word) and not _NOT_A_WORD.search(word):
            keywords.append(word)
    return tuple(keywords)


def clean_description(description: str, title: str) -> str:
    """Return a description that is a short sentence about the image, else ""."""
    text = _words(description)
    if _NOT_A_DESCRIPTION.search(text) or len(text) > MAX_DESCRIPTION_CHARACTERS:
        return ""
    return text if len(text.split()) >= 4 and text.lower() != title.lower() else ""


def _card_title(record: Record) -> str:
    """Return a title such as "six of diamonds" for playing cards; only the file name has suit and rank."""
    found = _CARD.match(PurePosixPath(record.path).stem)
    if not found:
        return ""
    return f"{_RANKS[found.group(2)]} of {_SUITS[found.group(1)]}" if found.group(1) else "joker"


def _without_author(text: str, author: str) -> str:
    """Remove the author's name from the end of a title."""
    names, words = {*_tokens(author), "by", "c"}, text.split()
    while words and {*_tokens(words[-1])} <= names:
        words.pop()
    return " ".join(words)


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _words(text: str) -> str:
    # Entities were escaped twice in part of the collection.
    text = html.unescape(html.unescape(text)).replace("_", " ")
    if " " not in text.strip():
        text = _part_camel_case(text.replace("-", " "))
    return re.sub(r"\s+", " ", text).strip()


def _part_camel_case(text: str) -> str:
    return re.sub(r"(?<=[a-z]{2})(?=[A-Z][a-z])", " ", text)


def _has_word(text: str) -> bool:
    return re.search(r"[^\W\d_]{3}", text) is not None


def _folder_words(record: Record, title: str) -> tuple[str, ...]:
    words = (_PARTED.get(part, part.replace("_", " ")) for part in PurePosixPath(record.path).parent.parts[::-1])
    return tuple(w for w in words if w not in _FOLDER_NOT_A_KEYWORD and w not in title.lower())


def _merge(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """Append the words of `second` that are not, even in the singular, in `first`."""
    stems = {word.rstrip("s") for word in first}
    return (*first, *(word for word in second if word.rstrip("s") not in stems))
