"""Image sizes that an autoencoder's factor does not divide: refused or padded by choice, never silently cropped.

Shapes: B batch, H×W image pixels.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

OnIndivisible = Literal["refuse", "pad"]


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The smallest size, both sides multiples of `multiple`, that holds an image."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def pad_to_multiple(image: Tensor, multiple: int, on_indivisible: OnIndivisible) -> Tensor:
    """Images (B, 3, H, W) of any dtype whose sides are multiples of `multiple`, the image in the upper left corner.

    What is added on the right and below mirrors the image; where a side is too short for a mirror, its last row or
    column is repeated. Cut what comes back with `cut_to`. Raises ValueError: a side does not fit and is to be refused.
    """
    height, width = image.shape[-2:]
    padded_height, padded_width = padded_size(height, width, multiple)
    if (padded_height, padded_width) == (height, width):
        return image
    if on_indivisible != "pad":
        raise ValueError(
            f"image: got {width}x{height} pixels, expected multiples of {multiple}; "
            "on_indivisible='pad' mirrors the edges and cuts them off again"
        )
    down, right = padded_height - height, padded_width - width
    mode = "reflect" if down < height and right < width else "replicate"
    # Integer images cannot be mirrored by torch; float32 holds every uint8 exactly.
    return F.pad(image.float(), (0, right, 0, down), mode=mode).to(image.dtype)


def cut_to(image: Tensor, height: int, width: int) -> Tensor:
    """The upper left (…, height, width) of images: what `pad_to_multiple` was given."""
    return image[..., :height, :width]
