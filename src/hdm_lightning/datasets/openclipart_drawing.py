"""Render a drawing (white background, cropped to its content, at an exact size) and recognize near-duplicates.

H, W: image height and width in pixels.
"""

import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdm_lightning.errors import first_line

Pixels = NDArray[np.uint8]

# Without a resolution, resvg cannot size drawings that are measured in millimeters.
DPI = 96
MAX_ASPECT = 4.0
MAX_RENDER_PX = 6144
WHITE_FROM = 248
# White margin around a cropped drawing, as a fraction of its long side.
MARGIN = 0.03
# A drawing that covers less of its page's long side is a leftover; one with less ink or contrast is blank.
MIN_PAGE_SHARE, MIN_INK_SHARE, MIN_DEVIATION = 0.04, 0.005, 4.0
_TEXT = re.compile(rb"<(?:\w+:)?text\b[^>]*[^/]>(?:\s*<[^>]*>)*\s*[^\s<]")


class Unusable(Exception):
    """A drawing cannot be used; the message says why in a few words."""


def render(file: Path, side_px: int, *, short_side: bool = False) -> Image.Image:
    """Return the drawing in RGB with its long (or short) side exactly `side_px`.

    Raises:
        Unusable: the drawing cannot be rendered, is blank, tiny or too elongated, or needs fonts.
    """
    if _TEXT.search(file.read_bytes()):
        raise Unusable("holds text, which depends on the fonts of the machine")
    page = _render_page(file, max(256, side_px + side_px // 4))
    box = _ink_box(page)
    long, short = max(box[2] - box[0], box[3] - box[1]), min(box[2] - box[0], box[3] - box[1])
    if long > MAX_ASPECT * short:
        raise Unusable(f"longer than {MAX_ASPECT:g}:1")
    reached = short if short_side else long
    if reached < side_px:
        enlarged = min(MAX_RENDER_PX, int(max(page.shape[:2]) * side_px * 1.05 / reached) + 2)
        page = _render_page(file, enlarged)
        box = _ink_box(page)
    return _fit(_with_margin(page, box), side_px, short_side)


def encode_webp(image: Image.Image, quality: int) -> bytes:
    """Return the image as WebP."""
    encoded = io.BytesIO()
    image.save(encoded, format="WEBP", quality=quality, method=6)
    return encoded.getvalue()


def _render_page(file: Path, fit_px: int) -> Pixels:
    """Return the whole page, its long side `fit_px`: uint8 (H, W, 3)."""
    import resvg_py  # noqa: PLC0415  an optional dependency that only this builder needs

    try:
        png = resvg_py.svg_to_bytes(
            svg_path=str(file),
            background="#ffffff",
            dpi=DPI,
            width=fit_px,
            height=fit_px,
            skip_system_fonts=True,
        )
    except ValueError as error:
        raise Unusable(f"cannot be rendered: {first_line(error, 80)}") from error
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _ink_box(page: Pixels) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the part that is not white."""
    ink = page.min(axis=2) < WHITE_FROM
    if ink.mean() == 0 or page.std(axis=(0, 1)).max() < MIN_DEVIATION:
        raise Unusable("blank")
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    if max(right - left, bottom - top) < MIN_PAGE_SHARE * max(page.shape[:2]):
        raise Unusable("tiny on its page")
    if ink[top:bottom, left:right].mean() < MIN_INK_SHARE:
        raise Unusable("blank")
    return left, top, right, bottom


def _with_margin(page: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """Crop to the box; where the edge is mostly white (no frame, no backdrop), leave a white margin."""
    left, top, right, bottom = box
    crop = page[top:bottom, left:right]
    if crop.std(axis=(0, 1)).max() < MIN_DEVIATION:
        raise Unusable("a single color")
    edge = np.concatenate([crop[0], crop[-1], crop[:, 0], crop[:, -1]])
    if (edge >= WHITE_FROM).all(axis=1).mean() < 0.5:
        return crop
    margin = max(1, round(MARGIN * max(crop.shape[:2])))
    return np.pad(crop, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)


def _fit(crop: Pixels, side_px: int, short_side: bool) -> Image.Image:
    height, width = crop.shape[:2]
    scale = side_px / (min if short_side else max)(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(crop).resize(size, Image.Resampling.LANCZOS)


SIDE_PX = 24
# In 8-bit values: images are duplicates if the mean and the largest difference of their miniatures are smaller.
MAX_MEAN_DIFFERENCE, MAX_DIFFERENCE = 2.0, 32.0
MAX_ASPECT_RATIO = 1.05


class Miniatures:
    """Miniatures of the images seen so far."""

    def __init__(self) -> None:
        self._images: list[NDArray[np.float32]] = []
        self._marks: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return len(self._images)

    def add(self, encoded: bytes) -> bool:
        """Add an encoded image unless it is a near-duplicate of one seen; return whether it was new."""
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        small = np.asarray(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), dtype=np.float32)
        mark = (float(np.log(image.width / image.height)), float(small.mean()))
        if self._holds(small, mark):
            return False
        self._images.append(small)
        self._marks.append(mark)
        return True

    def _holds(self, small: NDArray[np.float32], mark: tuple[float, float]) -> bool:
        if not self._marks:
            return False
        # The difference of means is at most the mean absolute difference: a cheap test before comparing pixels.
        limits = (np.log(MAX_ASPECT_RATIO), MAX_MEAN_DIFFERENCE)
        near = (np.abs(np.array(self._marks) - mark) < limits).all(axis=1)
        for i in np.flatnonzero(near):
            difference = np.abs(self._images[i] - small)
            if difference.mean() < MAX_MEAN_DIFFERENCE and difference.max() < MAX_DIFFERENCE:
                return True
        return False
