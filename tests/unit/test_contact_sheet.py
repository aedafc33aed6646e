"""Contact sheets: every picture whole, captions inside their cells."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from hdm_lightning.generation.caption_fonts import CaptionFont
from hdm_lightning.generation.contact_sheet import ELLIPSIS, FRAME, contact_sheet, wrap_caption

DEJAVU = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


def area_of(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


def test_pictures_of_mixed_sizes_are_whole_and_enlarged_by_whole_factors() -> None:
    sizes = [(32, 32), (64, 16), (16, 64), (200, 100), (192, 192)]
    pictures = [Image.new("RGB", size, colour) for size, colour in zip(sizes, COLOURS, strict=True)]
    sheet = contact_sheet(pictures, ["one", "two", "three", "four", "five"], columns=3, cell_px=192)
    for (width, height), colour in zip(sizes, COLOURS, strict=True):
        factor = max(1, 192 // max(width, height))
        assert area_of(sheet, colour) == width * height * factor * factor


def test_captions_do_not_cover_pictures_and_are_drawn() -> None:
    pictures = [Image.new("RGB", (192, 192), COLOURS[0])] * 4
    bare, captioned = contact_sheet(pictures, [""] * 4), contact_sheet(pictures, ["a caption " * 30] * 4)
    assert area_of(bare, COLOURS[0]) == area_of(captioned, COLOURS[0]) == 4 * 192 * 192
    assert (np.asarray(captioned).sum(axis=-1) < 300).sum() > 500  # ink
    assert captioned.height > bare.height


def test_wrapped_lines_fit_and_the_rest_is_cut() -> None:
    font = CaptionFont(14, files=[])
    text = "a large red circle on the left of a small blue star and a pneumonoultramicroscopicsilicovolcanoconiosis"
    lines = wrap_caption(text, font, 120, 3)
    assert len(lines) == 3
    assert all(font.getlength(line) <= 120 for line in lines)
    assert lines[-1].endswith(ELLIPSIS)
    assert wrap_caption("a star", font, 120, 3) == ["a star"]
    assert " ".join(wrap_caption(text, font, 1000, 3)) == text


def test_scripts_without_spaces_are_broken_anywhere() -> None:
    font = CaptionFont(14, files=[DEJAVU])
    text = "\u0e81\u0e82" * 20  # Lao
    lines = wrap_caption(text, font, 120, 9)
    assert len(lines) > 1 and "".join(lines) == text
    assert all(font.getlength(line) <= 120 for line in lines)


def written(font: CaptionFont, text: str) -> np.ndarray:
    sheet = Image.new("RGB", (400, 40), (255, 255, 255))
    font.write(ImageDraw.Draw(sheet), (4, 4), text, (0, 0, 0))
    return np.asarray(sheet)


def test_what_one_font_lacks_is_written_in_another() -> None:
    """Pillow's own has no Cyrillic: the text is as DejaVu draws it, one width and one shape."""
    font, dejavu = CaptionFont(14, files=[DEJAVU]), ImageFont.truetype(str(DEJAVU), 14)
    assert font.getlength("\u043a\u043e\u0442") == dejavu.getlength("\u043a\u043e\u0442")
    assert font.getlength("cat") == ImageFont.load_default(14).getlength("cat")
    other = Image.new("RGB", (400, 40), (255, 255, 255))
    first, base = ImageFont.load_default(14).getmetrics()[0], dejavu.getmetrics()[0]
    ImageDraw.Draw(other).text((4, 4 + first - base), "M\u00fcller", fill=(0, 0, 0), font=dejavu)
    assert (written(font, "M\u00fcller") == np.asarray(other)).all()


def test_what_no_font_has_is_named_and_counted() -> None:
    bare = CaptionFont(14, files=[])
    assert (written(bare, "\u732b\u732b") == written(bare, "[CJK x2]")).all()
    assert bare.getlength("\u732b\u732b") == bare.getlength("[CJK x2]")


def test_white_images_have_a_frame() -> None:
    sheet = contact_sheet([Image.new("RGB", (192, 100), (255, 255, 255))], [""])
    assert area_of(sheet, FRAME) == 2 * (194 + 102) - 4


def test_a_caption_each_is_required() -> None:
    with pytest.raises(ValueError, match="captions: got 1 for 2 images"):
        contact_sheet([Image.new("RGB", (4, 4))] * 2, ["one"])
