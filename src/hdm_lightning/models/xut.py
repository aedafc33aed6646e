"""The Cross-U-Transformer (arXiv 2509.06068): predicts a velocity from a noisy latent and a text.

Shapes: B batch, C channels, H×W latent, p patch, N = (H/p)(W/p) image tokens, L text tokens, S = N+L, D width,
K kept image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from hdm_lightning.models import inputs, routing
from hdm_lightning.models.attention import Linear
from hdm_lightning.models.blocks import XUTBlock
from hdm_lightning.models.conditioning import (
    AspectRatioEmbedding,
    BlockModulation,
    SharedModulation,
    TimeEmbedding,
)
from hdm_lightning.models.config import XUTConfig
from hdm_lightning.models.initialization import initialize
from hdm_lightning.models.positions import token_positions as full_positions


class TokenSequence(NamedTuple):
    """The tokens between two blocks, with the other inputs of every block."""

    tokens: Tensor
    positions: Tensor
    key_mask: Tensor | None
    modulation: BlockModulation

    def through(self, block: nn.Module, memory: Tensor | None = None) -> TokenSequence:
        """Return the sequence after a block."""
        return self.with_tokens(block(self.tokens, self.positions, self.modulation, self.key_mask, memory))

    def with_tokens(self, tokens: Tensor) -> TokenSequence:
        """Return the sequence with its tokens replaced."""
        return TokenSequence(tokens, self.positions, self.key_mask, self.modulation)


class XUT(nn.Module):
    """Cross-U-Transformer: patch tokens and text through a routed U whose decoder reads its encoder.

    Parameters are initialized by `initialization.initialize` from torch's default generator.

    Attributes:
        has_compiled_blocks: whether `compile_blocks` was called; batches should then keep one shape.
    """

    has_compiled_blocks = False

    def __init__(self, config: XUTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_values = config.width, config.channels * config.patch_size**2
        self.patch_embedding = Linear(patch_values, width)
        self.text_projection = Linear(config.context_width, width)
        self.time_embedding = TimeEmbedding(width)
        self.aspect_embedding = AspectRatioEmbedding(width) if config.aspect_ratio else None
        self.modulation = SharedModulation(width, cross_attention=config.reads_encoder)
        self.blocks_before = nn.ModuleList(XUTBlock(config) for _ in range(config.blocks_before))
        self.encoder = nn.ModuleList(
            nn.ModuleList(XUTBlock(config) for _ in range(config.encoder_blocks)) for _ in range(config.depth)
        )
        self.decoder = nn.ModuleList(
            nn.ModuleList(_decoder_block(config, first=i == 0) for i in range(config.decoder_blocks))
            for _ in range(config.depth)
        )
        self.blocks_after = nn.ModuleList(XUTBlock(config) for _ in range(config.blocks_after))
        self.output_projection = Linear(width, patch_values)
        initialize(self, config.rope_init, self.output_projection)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """Create a network from a preset, such as ``xut_base``, with some fields of its configuration replaced.

        Args:
            name: one of `models.config.PRESETS`.
            changes: fields of `XUTConfig`.

        Raises:
            ValueError: there is no such preset or field, or a value is out of range.
        """
        return cls(XUTConfig.preset(name, **changes))

    @classmethod
    def from_fields(cls, **fields: Any) -> Self:
        """Create a network from the fields of `XUTConfig`; missing ones take their defaults.

        Raises:
            ValueError: there is no such field, or a value is out of range.
        """
        return cls(XUTConfig.from_json(fields))

    def blocks(self) -> Iterator[XUTBlock]:
        """Return all blocks in the order of the forward pass."""
        return (module for module in self.modules() if isinstance(module, XUTBlock))

    def forward(
        self,
        latent: Tensor,
        t: Tensor,
        context: Tensor,
        *,
        context_lengths: Tensor | None = None,
        token_positions: Tensor | None = None,
        log_aspect_ratio: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity ε − x.

        Args:
            latent: (B,C,H,W), H and W divisible by the patch.
            t: (B,) finite; times on the path are in [0, 1], 1 is noise.
            context: (B,L,context_width) hidden states of the text encoder.
            context_lengths: (B,) integers; tokens past the length are ignored. None: all L tokens are used, and
                attention runs without a mask.
            token_positions: (B or 1,N,2) as (y, x); the full grid in the configured convention by default.
            log_aspect_ratio: (B,) log(W/H) of the full image; that of the latent by default. Ignored by a network
                without this input.
            keep: image tokens that pass through the U: (B,K) distinct int64 indices, or (B,N) bool with the same
                count in every row (which waits for the device). None, or all tokens: no routing.

        Returns:
            (B,C,H,W), in the dtype of the activations.

        Raises:
            ValueError: an argument does not have the shape or values above. Values of tensors are checked on
                the CPU only.
        """
        inputs.check_latent(latent, self.config)
        inputs.check_conditions(latent.shape[0], t, context, log_aspect_ratio, self.config)
        sequence = self._embed(latent, t, context, context_lengths, token_positions, log_aspect_ratio)
        tokens = sequence.tokens.shape[1] - context.shape[1]
        kept = None if keep is None else inputs.kept_indices(keep, latent.shape[0], tokens)
        for block in self.blocks_before:
            sequence = sequence.through(block)
        sequence = self._routed(sequence, kept, tokens)
        for block in self.blocks_after:
            sequence = sequence.through(block)
        patches = self.output_projection(sequence.tokens[:, :tokens])
        return inputs.unpatchify(patches, self.config.patch_size, latent.shape[2], latent.shape[3])

    def _embed(
        self,
        latent: Tensor,
        t: Tensor,
        context: Tensor,
        context_lengths: Tensor | None,
        positions: Tensor | None,
        log_aspect_ratio: Tensor | None,
    ) -> TokenSequence:
        dtype = self.patch_embedding.weight.dtype
        patches = inputs.patchify(latent.to(dtype), self.config.patch_size)
        (batch, tokens), text = patches.shape[:2], context.shape[1]
        key_mask = None
        if context_lengths is not None:
            inputs.check_context_lengths(context_lengths, batch, text)
            counts = torch.arange(text, device=context.device) < context_lengths.unsqueeze(1)
            context = context.masked_fill(~counts.unsqueeze(-1), 0)
            key_mask = nn.functional.pad(counts, (tokens, 0), value=True)[:, None, None, :]
        if positions is None:
            positions = self._full_positions(latent)
        inputs.check_positions(positions, batch, tokens)
        embedded = (self.patch_embedding(patches), self.text_projection(context.to(dtype)))
        return TokenSequence(
            torch.cat(embedded, dim=1),
            nn.functional.pad(positions, (0, 0, 0, text)),
            key_mask,
            self.modulation(self._condition(latent, t, log_aspect_ratio)),
        )

    def _condition(self, latent: Tensor, t: Tensor, log_aspect_ratio: Tensor | None) -> Tensor:
        embedded = self.time_embedding(t)
        if self.aspect_embedding is None:
            return embedded
        if log_aspect_ratio is None:
            height, width = latent.shape[2:]
            log_aspect_ratio = torch.full_like(t, math.log(width / height), dtype=self.time_embedding.frequencies.dtype)
        return embedded + self.aspect_embedding(log_aspect_ratio)

    def _full_positions(self, latent: Tensor) -> Tensor:
        patch = self.config.patch_size
        return full_positions(
            latent.shape[2] // patch,
            latent.shape[3] // patch,
            convention=self.config.positions,
            device=latent.device,
            dtype=torch.promote_types(self.patch_embedding.weight.dtype, torch.float32),
        )

    def _routed(self, sequence: TokenSequence, kept: Tensor | None, tokens: int) -> TokenSequence:
        """Run the U on the kept image tokens and all text, and scatter its output back into the full sequence."""
        if kept is None:
            return self._u(sequence)
        indices = routing.with_text(kept, tokens, sequence.tokens.shape[1] - tokens)
        # The mask is true for every image token, so any K of its image entries are the mask of the kept tokens.
        mask = sequence.key_mask
        routed = self._u(
            TokenSequence(
                routing.gather_tokens(sequence.tokens, indices),
                routing.gather_tokens(sequence.positions, indices),
                None if mask is None else mask[..., tokens - kept.shape[1] :],
                sequence.modulation,
            )
        )
        return sequence.with_tokens(routing.scatter_tokens(sequence.tokens, indices, routed.tokens))

    def _u(self, sequence: TokenSequence) -> TokenSequence:
        """Run the encoder levels, then the decoder levels, whose first blocks take encoder outputs if skips exist."""
        memories = []
        for level in self.encoder:
            assert isinstance(level, nn.ModuleList)
            for block in level:
                sequence = sequence.through(block)
            memories.append(sequence.tokens)
        for level, memory in zip(self.decoder, self._skipped(memories), strict=True):
            assert isinstance(level, nn.ModuleList)
            for index, block in enumerate(level):
                sequence = sequence.through(block, memory if index == 0 else None)
        return sequence

    def _skipped(self, memories: list[Tensor]) -> Sequence[Tensor | None]:
        """Return the encoder output that each decoder level takes, or None."""
        if self.config.skips == "none":
            return [None] * len(memories)
        return [memories[-1]] * len(memories) if self.config.skips == "last" else memories[::-1]


def _decoder_block(config: XUTConfig, *, first: bool) -> XUTBlock:
    """Create a block of a decoder level; the first one takes an encoder level's output as `config.skips` says."""
    joins = config.skips == "concatenation"
    return XUTBlock(config, reads_memory=first and config.reads_encoder, joins_memory=first and joins)
