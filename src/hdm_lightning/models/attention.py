"""Self-attention and cross-attention with axial rotary embedding.

Shapes: B batch, S query tokens, M key tokens, H heads, d head dim, D = H·d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdm_lightning.models.rope import rotate, rotation_angles


class Linear(nn.Linear):
    """`torch.nn.Linear` whose parameters are allocated only: `initialization` fills those of the whole network once."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class SelfAttention(nn.Module):
    """Multi-head self-attention: packed q, k, v without bias, output with bias, scale 1/√d."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = Linear(width, 3 * width, bias=False)
        self.output = Linear(width, width)
        self.log_frequencies = nn.Parameter(torch.empty(heads, head_dim // 4, 2))

    def forward(self, tokens: Tensor, positions: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B,S,D) with positions (B or 1,S,2) to (B,S,D); ``key_mask`` (B,1,1,S) is true where a key counts."""
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
        """(B,S,D) reading (B,S,D) at the same positions (B or 1,S,2), to (B,S,D)."""
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
