"""A sample as training sees it, to look at: the crop, a map of where it lies, its positions and caption."""

from math import sqrt
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from hdm_lightning.data.samples import Sample

Convention = Literal["area", "long_side"]

IMAGE_PX = 192
MAP_PX = 56
GAP_PX = 4


def preview(sample: Sample, positions: Convention = "area") -> tuple[Image.Image, str]:
    """The crop above a small map of the full image with the crop marked in it, and a line of text.

    Args:
        sample: as a stream gives it.
        positions: convention of the positions of the crop's edges, as the network's.
    """
    canvas = Image.new("RGB", (IMAGE_PX, IMAGE_PX + GAP_PX + MAP_PX), "white")
    crop = Image.fromarray(np.ascontiguousarray(sample.image.transpose(1, 2, 0)))
    scale = IMAGE_PX / max(crop.size)
    canvas.paste(crop.resize((round(crop.width * scale), round(crop.height * scale))), (0, 0))
    _draw_map(ImageDraw.Draw(canvas), sample, 0, IMAGE_PX + GAP_PX)
    top, left, bottom, right = crop_positions(sample, positions)
    place = f"no. {sample.index}: y {top:+.2f} to {bottom:+.2f}, x {left:+.2f} to {right:+.2f}, {sample.length} tokens"
    return canvas, f"{place}: {f'MASKED, {sample.fault}' if sample.fault else sample.caption or '(no caption)'}"


def crop_positions(sample: Sample, convention: Convention = "area") -> tuple[float, float, float, float]:
    """Top, left, bottom and right edge of a crop as the network sees them (arXiv 2509.06068, position map).

    With `area` a full image of H×W pixels spans ±√(H/W) in y and ±√(W/H) in x, with `long_side` ±1 on its long side.
    """
    top, left, full_height, full_width = sample.crop
    _, height, width = sample.image.shape
    half = sqrt(full_height * full_width) / 2 if convention == "area" else max(full_height, full_width) / 2
    edges = (top - full_height / 2, left - full_width / 2)
    return edges[0] / half, edges[1] / half, (edges[0] + height) / half, (edges[1] + width) / half


def _draw_map(draw: ImageDraw.ImageDraw, sample: Sample, x: int, y: int) -> None:
    top, left, full_height, full_width = sample.crop
    _, height, width = sample.image.shape
    scale = (MAP_PX - 4) / max(full_height, full_width)
    draw.rectangle((x, y, x + full_width * scale, y + full_height * scale), outline="black")
    corner = (x + left * scale, y + top * scale)
    draw.rectangle((*corner, corner[0] + width * scale, corner[1] + height * scale), fill="orange", outline="black")
