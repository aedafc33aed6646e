"""JPEGs decoded by libjpeg-turbo straight into an array: the pixels that Pillow gives, without its copies.

Shapes: H×W pixels of the decoded image.
"""

from math import ceil

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ImageFile


def decode_jpeg(data: bytes, header: ImageFile.ImageFile, scale: int) -> NDArray[np.uint8] | None:
    """The pixels of an intact colour JPEG at a reduced scale.

    Args:
        data: the file.
        header: the same file as Pillow opened it, not loaded.
        scale: divisor of the sides: 1, 2, 4 or 8.

    Returns:
        uint8 (H,W,3), RGB, with sides ceil(side / scale); None where Pillow has to decide: another kind of pixels
        (grey, CMYK), or a file that makes the decoder complain.
    """
    if header.mode != "RGB":
        return None
    height, width = ceil(header.height / scale), ceil(header.width / scale)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None
