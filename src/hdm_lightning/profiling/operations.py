"""Parameters and floating-point operations of an XUT, counted on a network with shapes but no weights.

An R × C matrix takes 2·R·C operations per token, attention over S tokens 4·S²·D; nothing else is counted. Matrix sizes
and the places of attention are read from the network; which tokens pass through which part is defined here.

Shapes: N image tokens, L text tokens, K image tokens kept by routing, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.attention import CrossAttention, SelfAttention
from hdm_lightning.models.blocks import XUTBlock
from hdm_lightning.models.routing import tokens_kept

TRAINING_FACTOR = 3
"""Operations of a forward and backward pass relative to the forward pass alone."""

BLOCKS = ("blocks_before", "encoder", "decoder", "blocks_after")
"""The parts that consist of transformer blocks."""


@dataclass(frozen=True)
class Workload:
    """Number of tokens of a sample: N image tokens, L text tokens, K of the N inside the U."""

    image: int
    text: int
    kept: int

    @classmethod
    def of(cls, config: XUTConfig, height: int, width: int, text: int, *, rate: float = 0.0) -> "Workload":
        """Return the workload of a latent of height x width cells with ``text`` tokens at a routing rate.

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
        """Number of tokens outside the U, N+L."""
        return self.image + self.text

    @property
    def routed(self) -> int:
        """Number of tokens inside the U, K+L."""
        return self.kept + self.text

    def through(self, part: str) -> int:
        """Return the tokens of a sample that pass through a part; conditioning processes one vector."""
        return {
            "patch_embedding": self.image,
            "text_projection": self.text,
            "blocks_before": self.full,
            "encoder": self.routed,
            "decoder": self.routed,
            "blocks_after": self.full,
            "output_projection": self.image,
        }.get(part, 1)


@dataclass(frozen=True)
class Part:
    """Size of one part of the network."""

    parameters: int  # number of trainable parameters
    matrix_elements: int  # number of these in matrices that multiply tokens
    attentions: int  # number of attention layers
    largest_block: int  # parameters of its largest transformer block; 0 if there is none


@lru_cache(maxsize=64)
def network_parts(config: XUTConfig) -> Mapping[str, Part]:
    """Return the parts of a network by attribute name, in the order of the forward pass."""
    with torch.device("meta"):
        network = XUT(config)
    return {name: _part(part) for name, part in network.named_children()}


def parameter_count(config: XUTConfig) -> int:
    """Return the number of parameters of the whole network."""
    return sum(part.parameters for part in network_parts(config).values())


def forward_flops(config: XUTConfig, work: Workload) -> dict[str, int]:
    """Return the FLOPs of one sample's forward pass by part, two per multiply-add, matrix products only.

    Training takes `TRAINING_FACTOR` times as many, plus those of the blocks once more under activation checkpointing.
    """
    flops = {}
    for name, part in network_parts(config).items():
        tokens = work.through(name)
        flops[name] = 2 * tokens * part.matrix_elements + 4 * tokens**2 * config.width * part.attentions
    return flops


def attention_score_flops(config: XUTConfig, work: Workload) -> int:
    """Return the operations of all products q·kᵀ in one forward pass: 2·S²·D each."""
    parts = network_parts(config)
    return sum(2 * work.through(name) ** 2 * config.width * parts[name].attentions for name in BLOCKS)


@dataclass(frozen=True)
class AdapterCost:
    """Size of an adapter beside a frozen network, by the part of the network it is in."""

    parameters: Mapping[str, int]  # number of trained parameters
    elements: Mapping[str, int]  # elements of the matrices that multiply a token

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(self.parameters.values())


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one training sample, as executed by the kernels."""

    forward: int  # of the network
    backward: int  # of the network; includes the scores that fused attention recomputes
    recompute: int  # second forward pass of the blocks under activation checkpointing
    autoencoder: int = 0  # encoding the image
    text: int = 0  # encoding the caption

    @property
    def network(self) -> int:
        """Operations of all passes of the network."""
        return self.forward + self.backward + self.recompute

    @property
    def total(self) -> int:
        """All operations of the device for a sample."""
        return self.network + self.autoencoder + self.text

    @property
    def model(self) -> int:
        """Operations counted by model FLOPs utilization (MFU, arXiv 2204.02311 appendix B) with all weights trained."""
        return TRAINING_FACTOR * self.forward


def network_operations(
    config: XUTConfig, work: Workload, *, recompute: bool | Literal["selective"], fused_attention: bool = True
) -> Operations:
    """Return the operations of one training sample in the network; `recompute` is activation checkpointing of blocks.

    With `selective`, the two products of attention are not recomputed.

    With `fused_attention`, the backward pass of attention recomputes the scores, as in flash attention
    (arXiv 2205.14135); plain attention saves them.
    """
    parts = forward_flops(config, work)
    forward = sum(parts.values())
    # Latent, context, time and aspect ratio need no gradient.
    spared = parts["patch_embedding"] + parts["text_projection"] + parts["time_embedding"]
    spared += 2 * config.width if config.aspect_ratio else 0
    scores = attention_score_flops(config, work) if fused_attention else 0
    again = sum(parts[name] for name in BLOCKS) if recompute else 0
    if recompute == "selective" and fused_attention:  # plain attention is several operations, which are recomputed
        again -= 2 * attention_score_flops(config, work)
    return Operations(forward, 2 * forward - spared + scores, again)


def adapter_operations(
    config: XUTConfig,
    work: Workload,
    adapter: AdapterCost,
    *,
    recompute: bool | Literal["selective"],
    fused_attention: bool = True,
) -> Operations:
    """Do the same as `network_operations` for a frozen network with an adapter.

    A frozen matrix needs only the gradient of its input, and none if no trained parameter comes before it; those of the
    first block's attention are counted anyway.
    """
    parts, beside = (
        forward_flops(config, work),
        {name: 2 * work.through(name) * elements for name, elements in adapter.elements.items()},
    )
    attention, scores = 2 * attention_score_flops(config, work), 0
    within = {name: parts[name] for name in (*BLOCKS, "output_projection")}
    backward = sum(within.values()) + attention + 2 * sum(beside.values())
    if fused_attention:
        scores = attention // 2
    again = sum(parts[name] + beside.get(name, 0) for name in BLOCKS) if recompute else 0
    if recompute == "selective" and fused_attention:
        again -= attention
    return Operations(sum(parts.values()) + sum(beside.values()), backward + scores, again)


@lru_cache(maxsize=1024)
def training_flops(config: XUTConfig, latent: tuple[int, int], text: int, rate: float = 0.0) -> int:
    """Return the operations of one sample's forward and backward pass through the network.

    These are the model FLOPs of arXiv 2204.02311, appendix B: matrix products, two operations per multiply-add,
    without recomputed activations and without the frozen encoders.

    Args:
        config: configuration of the network.
        latent: height and width of the latent in cells.
        text: text tokens, including padding.
        rate: TREAD's share of image tokens that skip the U.
    """
    return TRAINING_FACTOR * sum(forward_flops(config, Workload.of(config, *latent, text, rate=rate)).values())


def _part(part: nn.Module) -> Part:
    modules = list(part.modules())
    return Part(
        parameters=_size(part),
        matrix_elements=sum(each.weight.numel() for each in modules if isinstance(each, nn.Linear)),
        attentions=sum(isinstance(each, SelfAttention | CrossAttention) for each in modules),
        largest_block=max((_size(each) for each in modules if isinstance(each, XUTBlock)), default=0),
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
