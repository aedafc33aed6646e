"""What an autoencoder's generator minimises on one branch: its terms per sample, and their weighted sum.

Shapes: images (B,3,H,W) in [-1, 1]; every term (B,).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hdm_lightning.autoencoding.losses import kl_divergence, pixel_loss
from hdm_lightning.autoencoding.reconstruction import Reconstruction

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Distance (B,) of two batches of images in [-1, 1], frozen and differentiable in both."""


class LossWeights(Protocol):
    """Kind of the pixel term (`l1`, `l2` or `huber`) and the weights of the terms, each a mean per sample."""

    pixel: str
    pixel_weight: float
    perceptual_weight: float
    kl_weight: float


class GeneratorObjective:
    """The reconstruction terms and the KL divergence; the adversarial term is added where there is a discriminator.

    Args:
        settings: kinds and weights.
        perceptual: the perceptual distance, or None where its weight is 0.
    """

    def __init__(self, settings: LossWeights, perceptual: PerceptualDistance | None = None) -> None:
        self.settings = settings
        self.perceptual = perceptual if settings.perceptual_weight else None
        self.weights = {
            "pixel": settings.pixel_weight,
            "perceptual": settings.perceptual_weight,
            "kl": settings.kl_weight,
        }

    def terms(self, result: Reconstruction) -> dict[str, Tensor]:
        """Return every term (B,), unweighted."""
        output, target, posterior = result.output, result.target, result.posterior
        terms = {
            "pixel": pixel_loss(output, target, self.settings.pixel),  # type: ignore[arg-type]
            "kl": kl_divergence(posterior.mean, posterior.log_variance),
        }
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output, target)
        return terms

    def reconstruction(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted reconstruction (B,), without KL: what the adaptive weight is measured against."""
        names = [name for name in ("pixel", "perceptual") if name in terms]
        return torch.stack([self.weights[name] * terms[name] for name in names]).sum(0)

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Return reconstruction plus weighted KL (B,)."""
        return self.reconstruction(terms) + self.weights["kl"] * terms["kl"]
