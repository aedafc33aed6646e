"""Self-attention and cross-attention with axial rotary embedding.

The rotary frequencies are learned per head.

Shapes: B batch, S query tokens, M key tokens, H heads, d head dim, D = H·d width, A = d/2 angles (y and x alternate).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`torch.nn.Linear` that leaves its parameters uninitialized: `initialization` fills the whole network once."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class SelfAttention(nn.Module):
    """Multi-head self-attention: packed q, k, v without bias, output with bias, scale 1/√d."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = Linear(width, 3 * width, bias=False)
        self.output = Linear(width, width)
        self.log_frequencies = nn.Parameter(torch.empty(heads, head_dim // 4, 2))

    def forward(self, tokens: Tensor, positions: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B,S,D) with positions (B or 1,S,2) to (B,S,D); ``key_mask`` (B,1,1,S) is true for keys to attend to."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, self.head_dim))
        query_key, value = qkv.split((2, 1), dim=2)
        angles = rotation_angles(positions, self.log_frequencies)
        query, key = rotate(query_key, angles.unsqueeze(2)).unbind(2)
        return self.output(_attend(query, key, value.squeeze(2), key_mask))


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another; both sides are rotated."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query = Linear(width, width, bias=False)
        self.key_value = Linear(width, 2 * width, bias=False)
        self.output = Linear(width, width)
        self.log_frequencies = nn.Parameter(torch.empty(heads, head_dim // 4, 2))

    def forward(self, tokens: Tensor, memory: Tensor, positions: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B,S,D) attending to a memory (B,S,D) at the same positions (B or 1,S,2), to (B,S,D)."""
        query = self.query(tokens).unflatten(-1, (self.heads, self.head_dim))
        key_value = self.key_value(memory).unflatten(-1, (2, self.heads, self.head_dim))
        key, value = key_value.unbind(2)
        angles = rotation_angles(positions, self.log_frequencies)
        return self.output(_attend(rotate(query, angles), rotate(key, angles), value, key_mask))


def _attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention over (B,S,H,d) and (B,M,H,d), to (B,S,D)."""
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=key_mask
    )
    return mixed.transpose(1, 2).flatten(2)


def rotation_angles(positions: Tensor, log_frequencies: Tensor) -> Tensor:
    """Return rotary angles: angle 2j of a token is y·exp(f[j,0]) and angle 2j+1 is x·exp(f[j,1]).

    Angles are computed in at least float32, whatever the dtype of the activations.

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
    """Rotate each adjacent channel pair (2i, 2i+1) of (…,d) by angle i of (…,A), which is broadcast.

    Returns:
        (…,d) in the dtype of the features.
    """
    pairs = features.unflatten(-1, (-1, 2))
    # One complex product is several times faster in eager mode; the compiler fuses the real form but not the
    # complex one, which does not exist in half precision either.
    if features.dtype == angles.dtype and not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)
    even, odd = pairs.unbind(-1)
    cosine, sine = angles.cos().to(features.dtype), angles.sin().to(features.dtype)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
