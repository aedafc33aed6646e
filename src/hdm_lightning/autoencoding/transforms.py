"""Geometric transforms that act alike on an image and its latent, with exact sizes.

Shapes: image (B,3,f·H,f·W); latent (B,C,H,W); f = the autoencoder's downsampling factor, in pixels per latent cell.

EQ-VAE (arXiv 2502.09509, section 3) requires E(τx) = τE(x). Each transform here has one definition for both tensors:
it only needs the tensor's number of pixels per latent cell (f for an image, 1 for a latent).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Transform(Protocol):
    """A geometric transform of (B,C,H,W) tensors, defined in latent cells."""

    def __call__(self, tensor: Tensor, pixels_per_cell: int = 1) -> Tensor:
        """Return the transformed tensor; ValueError if its size would not be a whole number of cells."""


@dataclass(frozen=True)
class QuarterTurn:
    """Rotation by `turns` · 90° counter-clockwise; exact on the pixel grid."""

    turns: int

    def __call__(self, tensor: Tensor, pixels_per_cell: int = 1) -> Tensor:
        """Rotate; height and width swap if `turns` is odd."""
        return torch.rot90(tensor, self.turns, dims=(-2, -1))


@dataclass(frozen=True)
class Flip:
    """Mirror left-right."""

    def __call__(self, tensor: Tensor, pixels_per_cell: int = 1) -> Tensor:
        """Mirror; the size stays the same."""
        return torch.flip(tensor, dims=[-1])


@dataclass(frozen=True)
class Scale:
    """Bilinear resize by exact fractions of height and width, corners not aligned.

    Image and latent are sampled alike. EQ-VAE's reference experiment (arXiv 2502.09509, section 4) uses no
    antialiasing: below 1/2 it skips pixels and cells, and different ones, so no encoder can commute with it on fine
    detail. With `antialias` every pixel contributes, as when the images of a dataset are downscaled.
    """

    vertical: Fraction
    horizontal: Fraction
    antialias: bool = False

    @classmethod
    def uniform(cls, fraction: Fraction, antialias: bool = False) -> "Scale":
        """Return the isotropic scale by `fraction`."""
        return cls(fraction, fraction, antialias)

    def __call__(self, tensor: Tensor, pixels_per_cell: int = 1) -> Tensor:
        """Resize; ValueError if the scaled latent size is not a whole number of cells."""
        height, width = cells(tensor, pixels_per_cell)
        size = (
            scaled_cells(height, self.vertical) * pixels_per_cell,
            scaled_cells(width, self.horizontal) * pixels_per_cell,
        )
        if size == tuple(tensor.shape[-2:]):
            return tensor
        if not self.antialias:
            return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)
        # Torch implements the filter in half precision on some devices only.
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return F.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=True).to(tensor.dtype)


@dataclass(frozen=True)
class Crop:
    """A box of the latent grid: (top, left) corner and (height, width), all in latent cells."""

    top: int
    left: int
    height: int
    width: int

    def __call__(self, tensor: Tensor, pixels_per_cell: int = 1) -> Tensor:
        """Cut the box out; ValueError if it is empty or extends beyond the tensor."""
        rows, columns = cells(tensor, pixels_per_cell)
        inside = 0 <= self.top <= rows - self.height and 0 <= self.left <= columns - self.width
        if not inside or self.height < 1 or self.width < 1:
            raise ValueError(f"crop: {self} is not inside a grid of {rows}×{columns} cells")
        top, left = self.top * pixels_per_cell, self.left * pixels_per_cell
        bottom, right = top + self.height * pixels_per_cell, left + self.width * pixels_per_cell
        return tensor[..., top:bottom, left:right]


@dataclass(frozen=True)
class Sequential:
    """Several transforms, applied from the first to the last; empty means identity."""

    steps: tuple[Transform, ...] = ()

    def __call__(self, tensor: Tensor, pixels_per_cell: int = 1) -> Tensor:
        """Apply every step."""
        for step in self.steps:
            tensor = step(tensor, pixels_per_cell)
        return tensor


IDENTITY = Sequential()


def cells(tensor: Tensor, pixels_per_cell: int) -> tuple[int, int]:
    """Return the tensor's (height, width) in latent cells; ValueError if these are not whole numbers."""
    height, width = tensor.shape[-2:]
    if height % pixels_per_cell or width % pixels_per_cell:
        raise ValueError(f"tensor: {height}×{width} px is not a whole number of cells of {pixels_per_cell} px")
    return height // pixels_per_cell, width // pixels_per_cell


def scaled_cells(count: int, fraction: Fraction) -> int:
    """Return count · fraction; ValueError if that is not a positive whole number of cells."""
    scaled = count * fraction
    if scaled.denominator != 1 or scaled < 1:
        raise ValueError(f"scale: {fraction} of {count} latent cells is {float(scaled):g}, not a whole size")
    return int(scaled)


def exact_scales(count: int, numerators: Sequence[int], denominator: int) -> list[Fraction]:
    """Return the fractions n/denominator, n from `numerators`, that scale `count` cells to a whole number of cells."""
    fractions = (Fraction(n, denominator) for n in numerators)
    return [fraction for fraction in fractions if (count * fraction).denominator == 1 and fraction > 0]


def measured_transforms(cells: int) -> dict[str, dict[str, Transform]]:
    """Return the transforms that equivariance is measured on: quarter turns by degrees, and scales 1/4, 1/2 and 3/4.

    Only scales that are exact for this many cells per side are included, each without antialiasing, as in EQ-VAE's
    experiment, and with.
    """
    scales = {f"{float(scale):.2f}": scale for scale in exact_scales(cells, (1, 2, 3), 4)}
    return {
        "rotation": {str(90 * turns): QuarterTurn(turns) for turns in (1, 2, 3)},
        "scale": {name: Scale.uniform(scale) for name, scale in scales.items()},
        "scale_antialiased": {name: Scale.uniform(scale, antialias=True) for name, scale in scales.items()},
    }
