"""How close an output image is to its target: PSNR, SSIM, MS-SSIM, mean absolute error.

Shapes: output and target (B,3,H,W) in [-1, 1]; each measure (B,). Outputs are clamped to the range first.
"""

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

# Five scales of an 11-pixel window: torchmetrics wants more than 10 whole sixteenths a side.
SMALLEST_SIDE_MS_SSIM = 176

SMALLEST_SIDE = 6
"""Side in pixels from which SSIM can be taken: it mirrors 5 pixels at the edges."""

IMAGE_MEASURES = ("l1", "ms_ssim", "psnr_db", "ssim")


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB per sample (B,); 100 where they are equal."""
    error = (output.clamp(-1, 1) - target).div(2).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-10))


def image_quality(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return each of `IMAGE_MEASURES` per sample (B,); `ms_ssim` only of sides from 176 pixels."""
    output = output.clamp(-1, 1)
    # To [0, 1]: the comparison of means in SSIM is not that of published numbers around zero.
    levels = (output + 1) / 2, (target + 1) / 2
    one_scale = structural_similarity_index_measure(*levels, data_range=1.0, reduction="none")
    values = {
        "psnr_db": psnr(output, target),
        "l1": (output - target).abs().flatten(1).mean(1),
        "ssim": _per_sample(one_scale, target),
    }
    if min(target.shape[-2:]) >= SMALLEST_SIDE_MS_SSIM:
        scales = multiscale_structural_similarity_index_measure(*levels, data_range=1.0, reduction="none")
        values["ms_ssim"] = _per_sample(scales, target)
    return values


def _per_sample(value: Tensor | tuple[Tensor, Tensor], image: Tensor) -> Tensor:
    """Narrow torchmetrics' result, whose type allows for maps that are not asked for here."""
    assert isinstance(value, Tensor)
    return value.reshape(len(image))
