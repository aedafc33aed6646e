"""Axial rotary embedding with learnable frequencies per head.

Shapes: B batch, S tokens, H heads, d head dim, A = d/2 angles (y and x alternate).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_table(positions: Tensor, log_frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles.

    Angle 2j is y·exp(f[j,0]) and angle 2j+1 is x·exp(f[j,1]). Angles are formed in float32 or better,
    whatever the dtype of the activations.

    Args:
        positions: (B or 1,S,2) as (y, x).
        log_frequencies: (H,d/4,2).
        dtype: of the two tables.

    Returns:
        Two tensors (B or 1,S,H,A).
    """
    accurate = torch.promote_types(torch.promote_types(positions.dtype, log_frequencies.dtype), torch.float32)
    frequencies = log_frequencies.to(accurate).exp()
    angles = (positions.to(accurate)[:, :, None, None, :] * frequencies).flatten(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(features: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each adjacent channel pair (2i, 2i+1) of (…,H,d) by angle i of a table that broadcasts to it."""
    cosine, sine = table
    even, odd = features.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
