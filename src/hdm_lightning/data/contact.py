"""A contact sheet of samples as training sees them: crop, where it lies, caption.

Shapes: H×W pixels of a crop.
"""

import textwrap
from collections.abc import Sequence
from math import sqrt
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from hdm_lightning.data.samples import Sample

Convention = Literal["area", "long_side"]

PICTURE_PX = 192
MAP_PX = 56
TEXT_ROWS = 6
ROW_PX = 12
GAP_PX = 8
COLUMNS_OF_TEXT = 32


def contact_sheet(samples: Sequence[Sample], *, columns: int = 5, positions: Convention = "area") -> Image.Image:
    """Samples side by side, an RGB image.

    Under each crop stands a small map of the full image with the crop marked in it, the positions that the crop's
    edges have, and the caption as it was chosen.

    Args:
        samples: at least one.
        columns: samples in a row.
        positions: convention, as the network's.

    Raises:
        ValueError: there is no sample.
    """
    if not samples or columns < 1:
        raise ValueError(f"expected at least one sample and one column, got {len(samples)} and {columns}")
    cell_width, cell_height = PICTURE_PX + GAP_PX, PICTURE_PX + MAP_PX + TEXT_ROWS * ROW_PX + 2 * GAP_PX
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * cell_width + GAP_PX, rows * cell_height + GAP_PX), "white")
    for number, sample in enumerate(samples):
        row, column = divmod(number, columns)
        _draw(sheet, sample, GAP_PX + column * cell_width, GAP_PX + row * cell_height, positions)
    return sheet


def crop_positions(sample: Sample, convention: Convention = "area") -> tuple[float, float, float, float]:
    """Top, left, bottom and right edge of a crop as the network sees them (arXiv 2509.06068, position map).

    With `area` a full image of H×W pixels spans ±√(H/W) in y and ±√(W/H) in x, with `long_side` ±1 on its long side.
    """
    top, left, full_height, full_width = sample.crop
    _, height, width = sample.image.shape
    half = sqrt(full_height * full_width) / 2 if convention == "area" else max(full_height, full_width) / 2
    edges = (top - full_height / 2, left - full_width / 2)
    return edges[0] / half, edges[1] / half, (edges[0] + height) / half, (edges[1] + width) / half


def _draw(sheet: Image.Image, sample: Sample, x: int, y: int, positions: Convention) -> None:
    draw = ImageDraw.Draw(sheet)
    picture = Image.fromarray(np.ascontiguousarray(sample.image.transpose(1, 2, 0)))
    scale = PICTURE_PX / max(picture.size)
    sheet.paste(picture.resize((round(picture.width * scale), round(picture.height * scale))), (x, y))
    _draw_map(draw, sample, x, y + PICTURE_PX + GAP_PX)
    top, left, bottom, right = crop_positions(sample, positions)
    numbers = f"y {top:+.2f} … {bottom:+.2f}\nx {left:+.2f} … {right:+.2f}\n{sample.length} tokens\nno. {sample.index}"
    draw.multiline_text((x + MAP_PX + GAP_PX, y + PICTURE_PX + GAP_PX), _plain(numbers), fill="black", spacing=1)
    text = sample.fault or sample.caption or "(no caption)"
    lines = textwrap.wrap(_plain(text), COLUMNS_OF_TEXT)[:TEXT_ROWS]
    colour = "red" if sample.fault else "black"
    draw.multiline_text((x, y + PICTURE_PX + MAP_PX + GAP_PX), "\n".join(lines), fill=colour, spacing=1)


def _draw_map(draw: ImageDraw.ImageDraw, sample: Sample, x: int, y: int) -> None:
    top, left, full_height, full_width = sample.crop
    _, height, width = sample.image.shape
    scale = (MAP_PX - 4) / max(full_height, full_width)
    draw.rectangle((x, y, x + full_width * scale, y + full_height * scale), outline="black")
    corner = (x + left * scale, y + top * scale)
    draw.rectangle((*corner, corner[0] + width * scale, corner[1] + height * scale), fill="orange", outline="black")


def _plain(text: str) -> str:
    # Pillow's own font has Latin letters only.
    return text.replace("…", "to").encode("latin-1", "replace").decode("latin-1")
