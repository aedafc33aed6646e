"""Parameters and floating-point operations of an XUT in closed form, without building it.

Shapes: N image tokens, L text tokens, K image tokens kept by routing, D width, M hidden width of the SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass

from hdm_lightning.models.config import XUTConfig
from hdm_lightning.models.routing import tokens_kept

TRAINING_FACTOR = 3
"""Operations of a forward and a backward pass over those of the forward pass alone."""


@dataclass(frozen=True)
class Workload:
    """How many tokens a sample has: N image tokens, L text tokens, K of the N inside the U."""

    image: int
    text: int
    kept: int

    @classmethod
    def of(cls, config: XUTConfig, height: int, width: int, text: int, *, rate: float = 0.0) -> Workload:
        """The workload of a latent of height x width cells with ``text`` tokens at a routing rate.

        Raises:
            ValueError: the latent is not divisible by the patch, a number is negative, or the rate is outside [0, 1).
        """
        patch = config.patch_size
        if height < 1 or width < 1 or height % patch or width % patch:
            raise ValueError(f"latent has size {height}x{width}; expected multiples of the patch size {patch}")
        if text < 0:
            raise ValueError(f"text is {text}; expected the number of text tokens")
        image = (height // patch) * (width // patch)
        return cls(image, text, tokens_kept(image, rate))

    @property
    def full(self) -> int:
        """Tokens outside the U, N+L."""
        return self.image + self.text

    @property
    def routed(self) -> int:
        """Tokens inside the U, K+L."""
        return self.kept + self.text


@dataclass(frozen=True)
class Parts:
    """One number for each part of the network."""

    embedding: int
    conditioning: int
    blocks_before: int
    encoder: int
    decoder: int
    blocks_after: int
    output: int

    @property
    def total(self) -> int:
        """The sum over parts."""
        return self.blocks + self.embedding + self.conditioning + self.output

    @property
    def blocks(self) -> int:
        """The sum over all transformer blocks."""
        return self.blocks_before + self.encoder + self.decoder + self.blocks_after


def parameter_counts(config: XUTConfig) -> Parts:
    """Parameters of each part (buffers not counted)."""
    width, patch_values = config.width, config.channels * config.patch_size**2
    adaptive_norm = 2 * width + _linear(width, 4 * width) + _linear(4 * width, 3 * width)
    aspect = _linear(1, width) + _linear(width, width) if config.aspect_ratio else 0
    plain = _block_parameters(config)
    reading = plain + _cross_attention_parameters(config)
    return Parts(
        embedding=_linear(patch_values, width) + _linear(config.context_width, width),
        conditioning=_linear(width, width) + aspect + 3 * adaptive_norm,
        blocks_before=config.blocks_before * plain,
        encoder=config.depth * config.encoder_blocks * plain,
        decoder=config.depth * (reading + (config.decoder_blocks - 1) * plain),
        blocks_after=config.blocks_after * plain,
        output=_linear(width, patch_values),
    )


def forward_flops(config: XUTConfig, work: Workload) -> Parts:
    """Floating-point operations of one sample's forward pass, two a multiply-add, matrix products only.

    Training takes `TRAINING_FACTOR` times as many, and once more those of the blocks where each block's
    activations are recomputed.
    """
    width, patch_values = config.width, config.channels * config.patch_size**2
    aspect = width + width * width if config.aspect_ratio else 0
    adaptive_norms = 3 * (4 + 12) * width * width
    outside, inside = _block_flops(config, work.full), _block_flops(config, work.routed)
    reading = inside + _cross_attention_flops(config, work.routed)
    return Parts(
        embedding=2 * width * (work.image * patch_values + work.text * config.context_width),
        conditioning=2 * (width * width + aspect + adaptive_norms),
        blocks_before=config.blocks_before * outside,
        encoder=config.depth * config.encoder_blocks * inside,
        decoder=config.depth * (reading + (config.decoder_blocks - 1) * inside),
        blocks_after=config.blocks_after * outside,
        output=2 * work.image * width * patch_values,
    )


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _attention_parameters(config: XUTConfig) -> int:
    """Projections, norm gain and frequencies of either kind of attention."""
    width = config.width
    return _linear(width, 3 * width, bias=False) + _linear(width, width) + width + width // 2


def _block_parameters(config: XUTConfig) -> int:
    width, hidden = config.width, config.mlp_width
    feed_forward = _linear(width, 2 * hidden) + _linear(hidden, width) + width
    return _attention_parameters(config) + feed_forward


def _cross_attention_parameters(config: XUTConfig) -> int:
    return _attention_parameters(config)


def _attention_flops(config: XUTConfig, tokens: int) -> int:
    """Four D x D projections a token; two products of tokens x tokens x D."""
    return 2 * tokens * 4 * config.width**2 + 2 * 2 * tokens**2 * config.width


def _block_flops(config: XUTConfig, tokens: int) -> int:
    return _attention_flops(config, tokens) + 2 * tokens * 3 * config.width * config.mlp_width


def _cross_attention_flops(config: XUTConfig, tokens: int) -> int:
    return _attention_flops(config, tokens)
