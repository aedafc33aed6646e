"""Many pictures on one sheet, each above its caption."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (255, 255, 255)
INK = (32, 32, 32)
ELLIPSIS = "…"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    title: str = "",
    cell_px: int = 192,
    font_px: int = 14,
    caption_lines: int = 3,
) -> Image.Image:
    """Lay pictures out in rows, each centred in its cell with its caption below.

    Small pictures are enlarged by whole factors up to the cell, so that pixels stay visible as pixels; larger ones
    keep their size and widen the cells.

    Args:
        pictures: at least one, of any sizes.
        captions: one each; wrapped, and cut with an ellipsis after `caption_lines`.
        columns: pictures in a row; None makes the sheet about square.
        title: a line above the pictures, if not empty.
        cell_px: smallest side of a cell.
        font_px: height of the captions' type.
        caption_lines: lines kept for captions.

    Raises:
        ValueError: if there are no pictures or not one caption each.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"captions: got {len(captions)} for {len(pictures)} pictures, expected one each")
    font = ImageFont.load_default(font_px)
    shown = [_enlarged(picture.convert("RGB"), cell_px) for picture in pictures]
    columns = min(columns or _square_columns(len(shown)), len(shown))
    cell_width = max(cell_px, *(picture.width for picture in shown))
    margin, line_px = font_px // 2 + 1, round(font_px * 1.3)
    rows = [range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)]
    wrapped = [wrap_caption(caption, font, cell_width, caption_lines) for caption in captions]
    heights = [
        max(shown[i].height for i in row) + max(len(wrapped[i]) for i in row) * line_px + 3 * margin for row in rows
    ]
    top = margin + (line_px + margin if title else 0)
    sheet = Image.new("RGB", (columns * (cell_width + margin) + margin, top + sum(heights)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), title, fill=INK, font=font)
    for row, height in zip(rows, heights, strict=True):
        picture_height = max(shown[i].height for i in row)
        for column, i in enumerate(row):
            left = margin + column * (cell_width + margin)
            offset = (cell_width - shown[i].width) // 2, (picture_height - shown[i].height) // 2
            sheet.paste(shown[i], (left + offset[0], top + offset[1]))
            draw.multiline_text(
                (left, top + picture_height + margin), "\n".join(wrapped[i]), fill=INK, font=font, spacing=2
            )
        top += height
    return sheet


def wrap_caption(caption: str, font: Font, width_px: int, lines: int) -> list[str]:
    """A caption broken into at most `lines` lines no wider than `width_px`, the last one cut with an ellipsis."""
    broken = [""]
    for word in " ".join(caption.split()).split(" "):
        extended = f"{broken[-1]} {word}".strip()
        if font.getlength(extended) <= width_px or not broken[-1]:
            broken[-1] = extended
        else:
            broken.append(word)
    overflows = len(broken) > lines
    kept = [_cut(line, font, width_px) for line in broken[:lines]]
    if overflows:
        kept[-1] = _cut(broken[lines - 1] + ELLIPSIS, font, width_px)
    return kept


def _cut(line: str, font: Font, width_px: int) -> str:
    if font.getlength(line) <= width_px:
        return line
    bare = line.removesuffix(ELLIPSIS)
    while bare and font.getlength(bare + ELLIPSIS) > width_px:
        bare = bare[:-1]
    return bare + ELLIPSIS


def _enlarged(picture: Image.Image, cell_px: int) -> Image.Image:
    factor = max(1, cell_px // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST) if factor > 1 else picture


def _square_columns(count: int) -> int:
    columns = 1
    while columns * columns < count:
        columns += 1
    return columns
