"""Parameters and floating-point operations of an XUT, read off a network that has shapes and no weights.

A matrix of R × C takes each token that meets it 2·R·C operations, an attention over S tokens 4·S²·D; nothing else is
counted. How large the matrices are and where attention is, the network itself says; which tokens meet which of its
parts stands here.

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
"""Operations of a forward and a backward pass over those of the forward pass alone."""

BLOCKS = ("blocks_before", "encoder", "decoder", "blocks_after")
"""The parts that are made of transformer blocks."""


@dataclass(frozen=True)
class Workload:
    """How many tokens a sample has: N image tokens, L text tokens, K of the N inside the U."""

    image: int
    text: int
    kept: int

    @classmethod
    def of(cls, config: XUTConfig, height: int, width: int, text: int, *, rate: float = 0.0) -> "Workload":
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

    def through(self, part: str) -> int:
        """Tokens of a sample that go through a part; conditioning sees one vector."""
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
    """What one part of the network holds."""

    parameters: int  # numbers that are trained
    matrix_elements: int  # those of them in matrices that tokens are multiplied with
    attentions: int  # how often tokens attend to tokens
    largest_block: int  # parameters of its largest transformer block; 0 where there is none


@lru_cache(maxsize=64)
def network_parts(config: XUTConfig) -> Mapping[str, Part]:
    """The parts of a network by their attribute's name, in the order of the forward pass."""
    with torch.device("meta"):
        network = XUT(config)
    return {name: _part(part) for name, part in network.named_children()}


def parameter_count(config: XUTConfig) -> int:
    """Parameters of the whole network."""
    return sum(part.parameters for part in network_parts(config).values())


def forward_flops(config: XUTConfig, work: Workload) -> dict[str, int]:
    """Floating-point operations of one sample's forward pass, part by part, two a multiply-add, matrix products only.

    Training takes `TRAINING_FACTOR` times as many, and once more those of the blocks where each block's
    activations are recomputed.
    """
    flops = {}
    for name, part in network_parts(config).items():
        tokens = work.through(name)
        flops[name] = 2 * tokens * part.matrix_elements + 4 * tokens**2 * config.width * part.attentions
    return flops


def attention_score_flops(config: XUTConfig, work: Workload) -> int:
    """Operations of all products q·kᵀ of one forward pass: 2·S²·D each."""
    parts = network_parts(config)
    return sum(2 * work.through(name) ** 2 * config.width * parts[name].attentions for name in BLOCKS)


@dataclass(frozen=True)
class AdapterCost:
    """What is trained beside a frozen network, by the part of it that it stands in."""

    parameters: Mapping[str, int]  # numbers that are trained
    elements: Mapping[str, int]  # elements of the matrices that a token meets

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return sum(self.parameters.values())


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one training sample, as the kernels do them."""

    forward: int  # of the network
    backward: int  # of the network; fused attention computes its scores again there
    recompute: int  # second forward pass of the blocks under activation checkpointing
    autoencoder: int = 0  # encoding the image
    text: int = 0  # encoding the caption

    @property
    def network(self) -> int:
        """All passes of the network."""
        return self.forward + self.backward + self.recompute

    @property
    def total(self) -> int:
        """Everything the device computes for a sample."""
        return self.network + self.autoencoder + self.text

    @property
    def model(self) -> int:
        """What model FLOPs utilisation (MFU, arXiv 2204.02311 appendix B) counts, with every weight trained."""
        return TRAINING_FACTOR * self.forward


def network_operations(
    config: XUTConfig, work: Workload, *, recompute: bool | Literal["selective"], fused_attention: bool = True
) -> Operations:
    """Operations of one training sample in the network alone; `recompute` is activation checkpointing of the blocks.

    With `selective` the two products of attention are not computed again.

    With `fused_attention` attention's backward pass computes the scores again, as flash attention does
    (arXiv 2205.14135); the plain form keeps them.
    """
    parts = forward_flops(config, work)
    forward = sum(parts.values())
    # The latent, the context, the time and the aspect ratio need no gradient.
    spared = parts["patch_embedding"] + parts["text_projection"] + parts["time_embedding"]
    spared += 2 * config.width if config.aspect_ratio else 0
    scores = attention_score_flops(config, work) if fused_attention else 0
    again = sum(parts[name] for name in BLOCKS) if recompute else 0
    if recompute == "selective" and fused_attention:  # the plain form is several operations, which run again
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
    """As `network_operations`, of a network whose weights are frozen with an adapter beside them.

    A frozen matrix has a gradient of its input alone, and none where nothing that is trained comes before it; those of
    the first block's attention are counted all the same.
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
    """Operations of one sample's forward and backward pass through the network.

    These are the model FLOPs of arXiv 2204.02311, appendix B: matrix products, two operations a multiply-add,
    nothing counted twice (recomputed activations do not count), the frozen encoders left out.

    Args:
        config: of the network.
        latent: height and width of the latent in cells.
        text: text tokens fed, padding included.
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
