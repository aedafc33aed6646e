"""Images whose transparency masks the loss: the colors underneath, with alpha as a fourth channel.

Shapes: H×W pixels of an image, h×w of the crop.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from hdm_lightning.data.as_shown import has_alpha, layers_to_srgb, orientation, profile_of, turned
from hdm_lightning.data.crops import Crop
from hdm_lightning.data.decode import cut, decode, decode_rgb, load_upright, open_image
from hdm_lightning.data.faults import SampleFault

FAINT = 8
"""Smallest alpha of 255 at which a shrunk color comes from the visible pixels: below it, the resize rings."""


def decode_masked(data: bytes, choose: Callable[[int, int], Crop]) -> tuple[NDArray[np.uint8], Crop]:
    """Decode like `decode`, with a fourth channel: 255 for pixels that count, 0 for others; 255 without transparency.

    Returns:
        uint8 (4,h,w), RGB and alpha, and the crop.

    Raises:
        SampleFault: the bytes are not a usable image, or `choose` refuses it.
    """
    image = open_image(data)
    if not has_alpha(image):
        pixels, crop = decode(data, choose)
        return np.concatenate([pixels, np.full_like(pixels[:1], 255)]), crop
    colours, alpha = _layers(image)
    crop = choose(*alpha.shape)
    three = np.repeat(alpha[:, :, None], 3, axis=2)  # the resize expects three channels
    parts = [cut(part, crop) for part in (colours, three)]
    return np.concatenate([parts[0], parts[1][:1]]), crop


def load_with_alpha(data: bytes) -> Image.Image:
    """Decode the whole image, upright, 8-bit: RGBA with the colors under its alpha, or RGB if it is opaque.

    Raises:
        SampleFault: the bytes are not a usable image.
    """
    image = open_image(data)
    if not has_alpha(image):
        return turned(decode_rgb(image), orientation(image))
    colours, alpha = _layers(image)
    result = Image.fromarray(colours)
    if alpha.min() < 255:
        result.putalpha(Image.fromarray(alpha))
    return result


def with_mask(image: Image.Image, mask: bytes) -> Image.Image:
    """Return an image with a mask as its alpha: white counts, black does not, gray counts in part.

    Args:
        image: RGB, or RGBA, whose own alpha is multiplied by the mask.
        mask: an image file of any size, of which the lightness is used; it is stretched over the image.

    Raises:
        SampleFault: the mask cannot be used.
    """
    try:
        alpha = load_upright(mask).convert("L").resize(image.size, Image.Resampling.BOX)
    except SampleFault as fault:
        raise SampleFault(f"{fault} (in its mask)") from fault
    if image.mode == "RGBA":
        alpha = ImageChops.multiply(alpha, image.getchannel("A"))
    masked = image.convert("RGB")
    masked.putalpha(alpha)
    return masked


def shrunk(image: Image.Image, short_side_px: int) -> Image.Image:
    """Shrink an RGB or RGBA image to a short side in pixels; a smaller one stays as it is.

    Transparent pixels do not bleed into visible colors, and keep their own color where nothing else is visible.
    """
    if min(image.size) <= short_side_px:
        return image
    scale = short_side_px / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    small = image.resize(size, Image.Resampling.LANCZOS)
    if image.mode != "RGBA":
        return small
    alpha, under = small.getchannel("A"), image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    result = Image.composite(small.convert("RGB"), under, alpha.point(lambda level: 255 if level >= FAINT else 0))
    result.putalpha(alpha)
    return result


def _layers(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return colors (H,W,3) in sRGB and alpha (H,W) of an opened image, upright.

    Raises:
        SampleFault: the pixels cannot be decoded.
    """
    turn = orientation(image)
    try:
        if image.mode.startswith("I"):
            return _deep_grey_layers(image, turn)
        layers = np.array(turned(layers_to_srgb(image.convert("RGBA"), image.mode, profile_of(image)), turn))
    except Exception as error:
        raise SampleFault(f"undecodable image: {type(error).__name__}: {error}") from error
    return np.ascontiguousarray(layers[:, :, :3]), np.ascontiguousarray(layers[:, :, 3])


def _deep_grey_layers(image: Image.Image, turn: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the same for 16-bit gray, where one level means transparent."""
    plain = image.copy()
    see_through = plain.info.pop("transparency")
    alpha = Image.fromarray(np.where(np.asarray(plain) == see_through, 0, 255).astype(np.uint8))
    return np.array(turned(decode_rgb(plain), turn)), np.array(turned(alpha, turn))
