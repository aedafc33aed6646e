"""One autoencoder step: encode, apply the transform of the drawn branch, decode, and return output and target.

Shapes: image (B,3,f·H,f·W) in [-1, 1]; mean, log_variance, noise and latent (B,C,H,W).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hdm_lightning.autoencoding.branches import Branch, Draw


@dataclass(frozen=True)
class Posterior:
    """A diagonal normal distribution over latents (B,C,H,W)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std · noise, for standard normal noise of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


class TrainableAutoencoder(Protocol):
    """An autoencoder that a step can train: raw latents, gradients through encoder and decoder."""

    factor: int

    def posterior(self, image: Tensor) -> Posterior:
        """Return the distribution of latents of images in [-1, 1]."""

    def decode(self, latent: Tensor) -> Tensor:
        """Return the images of raw latents, approximately in [-1, 1]."""


@dataclass(frozen=True)
class Reconstruction:
    """Inputs of a step's losses: decoder output and target (B,3,h,w), and the posterior of the latent."""

    output: Tensor
    target: Tensor
    posterior: Posterior


def reconstruct(autoencoder: TrainableAutoencoder, image: Tensor, draw: Draw, noise: Tensor) -> Reconstruction:
    """Run one branch of EQ-VAE (arXiv 2502.09509, section 4).

    Args:
        autoencoder: the network in training.
        image: (B,3,f·H,f·W) in [-1, 1].
        draw: the step's branch and transform τ.
        noise: standard normal (B,C,H,W); the smaller latent of a downscaled image uses its upper left part.

    Raises:
        ValueError: τ has no exact size for this image.
    """
    if draw.branch is Branch.DOWNSCALED:
        image = draw.transform(image, autoencoder.factor)
    posterior = autoencoder.posterior(image)
    height, width = posterior.mean.shape[-2:]
    latent = posterior.sample(noise[..., :height, :width].to(posterior.mean))
    target = image
    if draw.branch is Branch.EQUIVARIANT:
        latent, target = draw.transform(latent), draw.transform(image, autoencoder.factor)
    return Reconstruction(autoencoder.decode(latent), target, posterior)
