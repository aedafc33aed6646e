"""Pictures whose transparency says what counts: colours as they lie under it, and the alpha as a fourth channel.

Shapes: H×W pixels of an image, h×w of the crop.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdm_lightning.data.colours import pixels_to_srgb, profile_of
from hdm_lightning.data.crops import Crop
from hdm_lightning.data.decode import cut, decode, load_upright, open_image
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.orientation import orientation, turned

_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


def decode_masked(data: bytes, choose: Callable[[int, int], Crop]) -> tuple[NDArray[np.uint8], Crop]:
    """As `decode`, with a fourth channel: 255 where a pixel counts, 0 where it does not; 255 where nothing says.

    Returns:
        uint8 (4,h,w), RGB and alpha, and the crop.

    Raises:
        SampleFault: the bytes are no image that can be used, or `choose` refuses it.
    """
    image = open_image(data)
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        pixels, crop = decode(data, choose)
        return np.concatenate([pixels, np.full_like(pixels[:1], 255)]), crop
    try:
        layers = np.array(turned(image.convert("RGBA"), orientation(image)))
    except Exception as error:
        raise SampleFault(f"undecodable image: {type(error).__name__}: {error}") from error
    crop = choose(*layers.shape[:2])
    colours = pixels_to_srgb(np.ascontiguousarray(layers[:, :, :3]), profile_of(image))
    alpha = np.repeat(layers[:, :, 3:], 3, axis=2)  # whoever resizes takes three channels
    parts = [cut(np.ascontiguousarray(part), crop) for part in (colours, alpha)]
    return np.concatenate([parts[0], parts[1][:1]]), crop


def with_mask(data: bytes, mask: bytes, *, short_side_px: int | None = None) -> bytes:
    """A picture as WebP with a mask as its alpha: white counts, black does not, grey in part.

    Args:
        data: the picture.
        mask: a picture of any size, whose lightness counts; it is stretched over the picture.
        short_side_px: a larger picture is shrunk to this short side.

    Raises:
        SampleFault: either cannot be used.
    """
    colours = load_upright(data)
    if short_side_px is not None and min(colours.size) > short_side_px:
        scale = short_side_px / min(colours.size)
        size = (round(colours.width * scale), round(colours.height * scale))
        colours = colours.resize(size, Image.Resampling.LANCZOS)
    alpha = load_upright(mask).convert("L").resize(colours.size, Image.Resampling.BOX)
    colours.putalpha(alpha)
    buffer = io.BytesIO()
    try:
        colours.save(buffer, "WEBP", quality=95, exact=True, method=4)  # exact: colours under the mask are kept
    except (OSError, ValueError) as error:
        raise SampleFault(f"cannot be written as WEBP: {error}") from error
    return buffer.getvalue()
