"""Render captions in any script: each run of characters in the first installed font that has them."""

import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_NOBODYS = "\U0010ffff"
"""A character that no font has, so it renders as the font's missing glyph."""

_WORDS = re.compile(r"\S+\s*|\s+")
_UNSEEN = ("Mn", "Me", "Cf", "Cc")
"""Unicode categories of characters without a glyph of their own."""

_ENDINGS = (".ttf", ".otf", ".ttc")
_PREFERRED = ("notosanscjk", "notosans", "dejavusans", "unifont", "droidsansfallback", "wqy", "ipag", "arialunicode")
"""File name prefixes of fonts to try first, as they cover many scripts."""

_STYLES = ("bold", "italic", "oblique", "light", "thin", "condensed", "mono", "serif", "black", "math")
"""Words in file names of fonts to try later."""

_EMPTY = ("lastresort", "adobeblank")
"""Fonts with a box or nothing for every character."""


class CaptionFont:
    """All fonts of this machine, used as one.

    Characters that no font has are written as the name of their script and a count, as in ``[CJK x7]``.

    Args:
        size_px: font size.
        files: fonts to try where Pillow's default font lacks a character; None searches the system's font folders.
    """

    def __init__(self, size_px: int, files: list[Path] | None = None) -> None:
        self._size_px, self._files = size_px, files
        self._first: Font = ImageFont.load_default(size_px)
        self._opened: dict[Path, Font | None] = {}
        self._of: dict[str, Font | None] = {}

    def getlength(self, text: str) -> float:
        """Return the width of a text in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def write(
        self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: tuple[int, int, int]
    ) -> None:
        """Write a line of text with its upper left corner at `place`; all fonts share one baseline."""
        left, top = place
        for font, run in self._runs(text):
            draw.text((left, top + _ascent(self._first) - _ascent(font)), run, fill=fill, font=font)
            left += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[Font, str]]:
        """Split a text into runs of one font each: the whole text, or words, or characters."""
        font = self._font_of(text)
        words = _WORDS.findall(text)
        if font is not None:
            yield font, text
        elif len(words) > 1:
            for word in words:
                yield from self._runs(word)
        else:
            for each, group in groupby(_with_marks(text), key=lambda cluster: self._font_of(cluster[0])):
                piece = "".join(group)
                yield (self._first, _in_words(piece)) if each is None else (each, piece)

    def _font_of(self, text: str) -> Font | None:
        """Return the first font that has all characters of a text, or None."""
        characters = {each for each in text if not (each.isspace() or unicodedata.category(each) in _UNSEEN)}
        key = "".join(sorted(characters))
        if key not in self._of:
            fonts = (font for font in self._candidates() if all(_has(font, each) for each in characters))
            self._of[key] = next(fonts, None)
        return self._of[key]

    def _candidates(self) -> Iterator[Font]:
        yield self._first
        if self._files is None:
            self._files = _installed()
        for path in self._files:
            if path not in self._opened:
                self._opened[path] = _opened(path, self._size_px)
            font = self._opened[path]
            if font is not None:
                yield font


def _with_marks(text: str) -> list[str]:
    """Split a text into characters, each with the combining and invisible characters that follow it."""
    clusters: list[str] = []
    for each in text:
        if clusters and unicodedata.category(each) in _UNSEEN:
            clusters[-1] += each
        else:
            clusters.append(each)
    return clusters


def _opened(path: Path, size_px: int) -> Font | None:
    try:
        return ImageFont.truetype(str(path), size_px)
    except OSError:
        return None


def _has(font: Font, character: str) -> bool:
    """Return whether a font has a glyph of its own for a character."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        return character.isascii()
    drawn, missing = font.getmask(character), font.getmask(_NOBODYS)
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


def _ascent(font: Font) -> int:
    return font.getmetrics()[0] if isinstance(font, ImageFont.FreeTypeFont) else 0


def _in_words(piece: str) -> str:
    """Describe characters that no font has by the first words of their Unicode names: ``[CJK x7]``."""
    names = [unicodedata.name(character, "character").split()[0] for character in piece if not character.isspace()]
    counted = {name: names.count(name) for name in dict.fromkeys(names)}
    return "".join(f"[{name} x{count}]" for name, count in counted.items())


def _installed() -> list[Path]:
    """List the font files of this machine, those with many scripts first."""
    found = {path for folder in _folders() for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS}

    def rank(path: Path) -> tuple[int, int, str]:
        name = path.name.lower().replace("-", "").replace(" ", "").replace("_", "")
        first = (place for place, begin in enumerate(_PREFERRED) if name.startswith(begin))
        return next(first, len(_PREFERRED)), sum(style in name for style in _STYLES), str(path)

    return sorted((path for path in found if not path.name.lower().startswith(_EMPTY)), key=rank)


def _folders() -> Iterator[Path]:
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    folders = [f"{data}/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts"]
    if sys.platform == "darwin":
        folders += ["~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts"]
    matplotlib = find_spec("matplotlib")
    yield from (Path(folder).expanduser() for folder in folders)
    if matplotlib is not None and matplotlib.origin:  # DejaVu comes with it
        yield Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf"
