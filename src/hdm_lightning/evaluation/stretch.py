"""Whether pictures of other aspect ratios are stretched squares, measured by the direction of their gradients.

Shapes: images (B,3,H,W), uint8.

Stretching a picture by s in x divides its horizontal gradients by s and leaves the vertical ones. The logarithm of
their ratio therefore rises by log s; compared with the square picture of the same prompt and seed, it tells s.
"""

import torch
from torch import Tensor

from hdm_lightning.evaluation.bootstrap import Bootstrap, Estimate

_LUMA = (0.299, 0.587, 0.114)
_FLAT = 1e-4


def luminance(images: Tensor) -> Tensor:
    """Grey levels in [0, 1], float32 (B,H,W), of uint8 images (B,3,H,W) (BT.601 weights)."""
    weights = torch.tensor(_LUMA, device=images.device).reshape(3, 1, 1)
    return (images.float() / 255.0 * weights).sum(1)


def log_anisotropy(images: Tensor) -> Tensor:
    """Half the logarithm of vertical over horizontal gradient energy, (B,).

    0 for content without direction; log s after stretching such content by s in x.
    """
    grey = luminance(images)
    across = grey.diff(dim=2).square().mean((1, 2))
    down = grey.diff(dim=1).square().mean((1, 2))
    # A flat picture has no direction: the floor, a hundredth of a grey level, makes it count as none.
    return 0.5 * torch.log((down + _FLAT**2) / (across + _FLAT**2))


def stretch_estimate(images: Tensor, squares: Tensor, bootstrap: Bootstrap) -> Estimate:
    """Geometric mean of how much pictures are stretched in x against the squares of the same prompts and seeds.

    1 means not at all; width / height means that squares were pulled to the frame.

    Args:
        images: (B,3,H,W).
        squares: (B,3,X,X).
        bootstrap: resamples pairs.

    Raises:
        ValueError: there is not one square for each picture.
    """
    if len(images) != len(squares):
        raise ValueError(f"squares: got {len(squares)} for {len(images)} images, expected one each")
    difference = (log_anisotropy(images) - log_anisotropy(squares)).cpu().double().numpy()
    found = bootstrap.mean(difference)
    value, low, high = (float(torch.tensor(x).exp()) for x in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.samples, found.method, found.resamples)
