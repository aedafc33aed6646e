"""The transformer block of XUT: self-attention, cross-attention in some blocks, and SwiGLU.

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdm_lightning.models.attention import CrossAttention, Linear, SelfAttention
from hdm_lightning.models.conditioning import BlockModulation, Modulation, autocast_device
from hdm_lightning.models.config import XUTConfig

NORM_EPS = 1e-6


class ModulatedNorm(nn.Module):
    """RMSNorm with a modulation that multiplies its gain and shifts its result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor, modulation: Modulation) -> Tensor:
        """(B,S,D) to (B,S,D): RMSNorm(x)·weight·gain + shift, rounded once to the dtype of the tokens."""
        # The norm already accumulates in float32. Autocast would also return float32 copies of the sequence and
        # keep them for the backward pass, at twice the memory and traffic.
        with torch.autocast(autocast_device(tokens), enabled=False):
            normed = F.rms_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)
            return torch.addcmul(modulation.shift, normed, self.weight * modulation.gain).to(tokens.dtype)


class SwiGLU(nn.Module):
    """silu(first half)·second half of a packed Linear, then a Linear back to the width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = Linear(width, 2 * hidden)
        self.output = Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,S,D) to (B,S,D)."""
        gate, value = self.input(tokens).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)


class XUTBlock(nn.Module):
    """One block of the network.

    Args:
        config: the network's configuration.
        reads_memory: whether to cross-attend to the memory between the other two sublayers.
        joins_memory: whether to first concatenate each token with the memory's and project (U-ViT, arXiv 2209.12152).
    """

    def __init__(self, config: XUTConfig, *, reads_memory: bool = False, joins_memory: bool = False) -> None:
        super().__init__()
        width, heads, head_dim = config.width, config.heads, config.head_dim
        self.residual_on_norm = config.residual == "normed"
        self.joins_memory = joins_memory
        if joins_memory:
            self.memory_projection = Linear(2 * width, width)
        self.self_attention_norm = ModulatedNorm(width)
        self.self_attention = SelfAttention(width, heads, head_dim)
        self.reads_memory = reads_memory
        if reads_memory:
            self.cross_attention_norm = ModulatedNorm(width)
            self.cross_attention = CrossAttention(width, heads, head_dim)
        self.feed_forward_norm = ModulatedNorm(width)
        self.feed_forward = SwiGLU(width, config.mlp_width)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        modulation: BlockModulation,
        key_mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """(B,S,D) to (B,S,D).

        Args:
            tokens: (B,S,D).
            positions: (B or 1,S,2) as (y, x), zero for text.
            modulation: the shared modulations.
            key_mask: (B,1,1,S) boolean, true where a token may be attended to; None for all.
            memory: (B,S,D) output of an encoder level, for a block that reads or joins one.
        """
        if self.joins_memory:
            assert memory is not None
            tokens = self.memory_projection(torch.cat((tokens, memory), dim=-1))
        normed = self.self_attention_norm(tokens, modulation.self_attention)
        mixed = self.self_attention(normed, positions, key_mask)
        tokens = self._add(tokens, normed, mixed, modulation.self_attention)
        if self.reads_memory:
            assert memory is not None
            assert modulation.cross_attention is not None
            normed = self.cross_attention_norm(tokens, modulation.cross_attention)
            mixed = self.cross_attention(normed, memory, positions, key_mask)
            tokens = self._add(tokens, normed, mixed, modulation.cross_attention)
        normed = self.feed_forward_norm(tokens, modulation.feed_forward)
        return self._add(tokens, normed, self.feed_forward(normed), modulation.feed_forward)

    def _add(self, tokens: Tensor, normed: Tensor, mixed: Tensor, modulation: Modulation) -> Tensor:
        base = normed if self.residual_on_norm else tokens
        with torch.autocast(autocast_device(tokens), enabled=False):
            return torch.addcmul(base, mixed, modulation.gate).to(tokens.dtype)
