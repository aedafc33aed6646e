"""Positions of the image tokens in the full image, as (y, x) pairs.

Shapes: B batch, N = height·width tokens in row-major order.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from hdm_lightning.models.config import PositionConvention


def token_positions(
    height: int,
    width: int,
    *,
    crop: Tensor | None = None,
    convention: PositionConvention | Literal["area", "long_side"] = "area",
    shift: tuple[float, float] = (0.0, 0.0),
    zoom: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the positions of token centers (arXiv 2509.06068, position map and camera control).

    A full image spans ±r_H in y and ±r_W in x: ``area`` has r_H = √(H/W), r_W = √(W/H); ``long_side`` has ±1
    on the long side and ±short/long on the other. The tokens of a crop keep their positions in the full image.

    Args:
        height: rows of tokens in the grid (in the crop, if there is one).
        width: columns of tokens.
        crop: (B,4) of (top, left, full_height, full_width) in tokens, fractions allowed; None for the full
            image, where positions are the same for every sample.
        convention: ``area`` (the paper) or ``long_side`` (the released network).
        shift: (y, x) added to every position: y > 0 moves the camera down, x > 0 to the right.
        zoom: positions are divided by it; above 1 moves the camera in.
        device: device of the result; the crop's by default.
        dtype: floating dtype; the crop's by default, at least float32.

    Returns:
        (B,N,2), or (1,N,2) without a crop, as (y, x).

    Raises:
        ValueError: an argument is out of range.
    """
    if height < 1 or width < 1:
        raise ValueError(f"token grid is {height}x{width}; expected at least 1x1")
    if not (math.isfinite(zoom) and zoom > 0):
        raise ValueError(f"zoom is {zoom}; expected a positive number")
    crop = _crop_numbers(height, width, crop, device, dtype)
    top, left, full_height, full_width = crop.unsqueeze(-1).unbind(1)
    reach_y, reach_x = _reach(full_height, full_width, convention)
    rows = torch.arange(height, device=crop.device, dtype=crop.dtype)
    columns = torch.arange(width, device=crop.device, dtype=crop.dtype)
    y = _axis(rows, top, full_height, reach_y, shift[0], zoom)
    x = _axis(columns, left, full_width, reach_x, shift[1], zoom)
    grid = (crop.shape[0], height, width)
    return torch.stack((y.unsqueeze(2).expand(grid), x.unsqueeze(1).expand(grid)), dim=-1).flatten(1, 2)


def _crop_numbers(
    height: int,
    width: int,
    crop: Tensor | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    if crop is None:
        # Filled on the device: copying a tensor made from a list would wait for the accelerator.
        numbers = [
            torch.full((1, 1), value, device=device, dtype=dtype or torch.float32) for value in (0, height, width)
        ]
        return torch.cat((numbers[0], numbers[0], numbers[1], numbers[2]), dim=1)
    if crop.dim() != 2 or crop.shape[1] != 4:
        raise ValueError(f"crop has shape {tuple(crop.shape)}; expected (B, 4): top, left, height, width")
    return crop.to(device=device, dtype=dtype or torch.promote_types(crop.dtype, torch.float32))


def _reach(height: Tensor, width: Tensor, convention: str) -> tuple[Tensor, Tensor]:
    if convention == "area":
        return (height / width).sqrt(), (width / height).sqrt()
    if convention == "long_side":
        longer = torch.maximum(height, width)
        return height / longer, width / longer
    raise ValueError(f"convention is {convention!r}; expected 'area' or 'long_side'")


def _axis(index: Tensor, start: Tensor, full: Tensor, reach: Tensor, shift: float, zoom: float) -> Tensor:
    centres = (2 * (index + start) + 1) / full - 1
    return (centres * reach + shift) / zoom
