"""Axial rotary embedding with learnable frequencies per head.

Shapes: B batch, S tokens, H heads, d head dim, A = d/2 angles (y and x alternate).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_angles(positions: Tensor, log_frequencies: Tensor) -> Tensor:
    """Angle 2j of a token is y·exp(f[j,0]) and angle 2j+1 is x·exp(f[j,1]).

    Angles are formed in float32 or better, whatever the dtype of the activations.

    Args:
        positions: (B or 1,S,2) as (y, x).
        log_frequencies: (H,d/4,2).

    Returns:
        (B or 1,S,H,A).
    """
    accurate = torch.promote_types(torch.promote_types(positions.dtype, log_frequencies.dtype), torch.float32)
    frequencies = log_frequencies.to(accurate).exp()
    return (positions.to(accurate)[:, :, None, None, :] * frequencies).flatten(-2)


def rotate(features: Tensor, angles: Tensor) -> Tensor:
    """Rotate each adjacent channel pair (2i, 2i+1) of (…,d) by angle i of (…,A), which broadcasts to it.

    Returns:
        (…,d) in the dtype of the features.
    """
    pairs = features.unflatten(-1, (-1, 2))
    # One complex product is several times faster in eager mode; the compiler fuses the real form and cannot
    # the complex one, which has no half precision either.
    if features.dtype == angles.dtype and not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)
    even, odd = pairs.unbind(-1)
    cosine, sine = angles.cos().to(features.dtype), angles.sin().to(features.dtype)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
