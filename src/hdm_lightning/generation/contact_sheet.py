"""Contact sheets: many images on one sheet, each above its caption."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from hdm_lightning.generation.caption_fonts import CaptionFont

BACKGROUND = (255, 255, 255)
INK = (32, 32, 32)
ELLIPSIS = "…"
_SPACELESS = r"\u0e00-\u0eff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
PIECES = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+\s*|\s+")
"""Pieces that a line may end with: a word and the space after it, or a character of Thai, Lao, Chinese or Japanese."""
FRAME = (208, 208, 208)
FONT_PX = 14


@dataclass(frozen=True)
class _Cell:
    """An image at its final size, and the lines of text below it."""

    image: Image.Image
    lines: list[str]


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    title: str = "",
    cell_px: int = 192,
    caption_lines: int = 3,
) -> Image.Image:
    """Lay images out in rows, each with its caption below.

    A thin frame shows where a white image ends. Captions may be in any script that an installed font has. Small
    images are enlarged by whole factors up to the cell, so pixels stay crisp; larger ones keep their size and widen
    their column.

    Args:
        images: at least one, of any sizes.
        captions: one per image; wrapped, and cut with an ellipsis after `caption_lines`.
        columns: images per row; None makes the sheet about square.
        title: a line above the images, if not empty.
        cell_px: minimum width of a column.
        caption_lines: maximum lines of a caption.

    Raises:
        ValueError: there are no images, or not one caption per image.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"captions: got {len(captions)} for {len(images)} images, expected one each")
    font = CaptionFont(FONT_PX)
    shown = [_enlarged(image.convert("RGB"), cell_px) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(shown))), len(shown))
    widths = [max(cell_px, *(image.width for image in shown[i::columns])) for i in range(columns)]
    cells = [
        _Cell(image, wrap_caption(caption, font, widths[i % columns], caption_lines))
        for i, (image, caption) in enumerate(zip(shown, captions, strict=True))
    ]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return _painted(rows, widths, title, font)


def _painted(rows: Sequence[Sequence[_Cell]], widths: Sequence[int], title: str, font: CaptionFont) -> Image.Image:
    """Paint rows of cells; the images of a row share a baseline, and their captions start at the same height."""
    margin, line_px = FONT_PX // 2 + 1, round(FONT_PX * 1.3)
    image_heights = [max(cell.image.height for cell in row) for row in rows]
    text_heights = [max(len(cell.lines) for cell in row) * line_px for row in rows]
    top = margin + (line_px + margin if title else 0)
    height = top + sum(image_heights) + sum(text_heights) + 3 * margin * len(rows)
    sheet = Image.new("RGB", (sum(widths) + margin * (len(widths) + 1), height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font.write(draw, (margin, margin), title, INK)
    for row, image_height, text_height in zip(rows, image_heights, text_heights, strict=True):
        left, baseline = margin, top + image_height
        for cell, width in zip(row, widths, strict=False):
            upper = baseline - cell.image.height
            draw.rectangle((left - 1, upper - 1, left + cell.image.width, baseline), outline=FRAME)
            sheet.paste(cell.image, (left, upper))
            for number, line in enumerate(cell.lines):
                font.write(draw, (left, baseline + margin + number * line_px), line, INK)
            left += width + margin
        top = baseline + text_height + 3 * margin
    return sheet


def wrap_caption(caption: str, font: CaptionFont, width_px: int, lines: int) -> list[str]:
    """Break a caption into at most `lines` lines no wider than `width_px`, the last one cut with an ellipsis.

    Lines break between words, and anywhere in scripts that are written without spaces.
    """
    broken = [""]
    for piece in PIECES.findall(" ".join(caption.split())):
        extended = f"{broken[-1]}{piece}"
        if font.getlength(extended.rstrip()) <= width_px or not broken[-1]:
            broken[-1] = extended
        else:
            broken.append(piece)
    broken = [line.strip() for line in broken]
    overflows = len(broken) > lines
    kept = [_cut(line, font, width_px) for line in broken[:lines]]
    if overflows:
        kept[-1] = _cut(broken[lines - 1] + ELLIPSIS, font, width_px)
    return kept


def _cut(line: str, font: CaptionFont, width_px: int) -> str:
    if font.getlength(line) <= width_px:
        return line
    bare = line.removesuffix(ELLIPSIS)
    while bare and font.getlength(bare + ELLIPSIS) > width_px:
        bare = bare[:-1]
    return bare + ELLIPSIS


def _enlarged(image: Image.Image, cell_px: int) -> Image.Image:
    factor = max(1, cell_px // max(image.size))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST) if factor > 1 else image
