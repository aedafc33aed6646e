"""Floating-point operations of one training sample, as the kernels do them.

Shapes: D width, S tokens of a block.
"""

from dataclasses import dataclass

from hdm_lightning.models import XUTConfig
from hdm_lightning.models.counts import TRAINING_FACTOR, Workload, forward_flops
from hdm_lightning.planning.recipe import Recipe, StageRecipe


@dataclass(frozen=True)
class Operations:
    """Operations per sample.

    Attributes:
        forward: of the network.
        backward: of the network; fused attention computes its scores again there.
        recompute: second forward pass of the blocks under activation checkpointing.
        autoencoder: encoding the image.
        text: encoding the caption.
    """

    forward: int
    backward: int
    recompute: int
    autoencoder: int
    text: int

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
        """What model FLOPs utilisation (MFU, arXiv 2204.02311 appendix B) counts: no operation twice."""
        return TRAINING_FACTOR * self.forward


def operations(recipe: Recipe, stage: StageRecipe, *, fused_attention: bool = True) -> Operations:
    """Operations of one sample of a stage; captions are padded to the stage's context length.

    Args:
        recipe: network and encoders.
        stage: resolution, routing, context and checkpointing.
        fused_attention: whether attention's backward pass recomputes the scores, as flash attention does
            (arXiv 2205.14135); the plain form keeps them.
    """
    work = recipe.work(stage)
    forward = forward_flops(recipe.network, work)
    # The latent, the context, the time and the aspect ratio need no gradient.
    spared = forward.embedding + 2 * recipe.network.width**2 + (2 * recipe.network.width if _aspect(recipe) else 0)
    scores = attention_score_flops(recipe.network, work) if fused_attention else 0
    return Operations(
        forward=forward.total,
        backward=2 * forward.total - spared + scores,
        recompute=forward.blocks if stage.checkpointing else 0,
        autoencoder=recipe.autoencoder.encode_flops(stage.resolution, stage.resolution),
        text=recipe.text.flops(stage.context_length),
    )


def attention_score_flops(config: XUTConfig, work: Workload) -> int:
    """Operations of all products q·kᵀ of one forward pass: 2·S²·D each."""
    outside = (config.blocks_before + config.blocks_after) * work.full**2
    inside = config.depth * (config.encoder_blocks + config.decoder_blocks + 1) * work.routed**2
    return 2 * config.width * (outside + inside)


def _aspect(recipe: Recipe) -> bool:
    return recipe.network.aspect_ratio
