"""The frozen encoders of a training run: images to latents, captions to context, without gradients.

B batch, H x W image in pixels, L caption tokens.
"""

import torch
from torch import Tensor

from hdm_lightning.encoders.base import ImageAutoencoder, TextEncoder


class FrozenEncoders:
    """Text encoder and autoencoder beside the network: not a module, so never trained, averaged or saved."""

    def __init__(self, text: TextEncoder, autoencoder: ImageAutoencoder) -> None:
        self.text = text
        self.autoencoder = autoencoder

    def to(self, device: torch.device) -> None:
        """Move both encoders to a device."""
        self.text.to(device)
        self.autoencoder.to(device)

    @torch.no_grad()
    def latents(self, image: Tensor) -> Tensor:
        """Normalised latents in float32 of uint8 images (B,3,H,W)."""
        return self.autoencoder.encode(image.float().div_(127.5).sub_(1.0)).float()

    @torch.no_grad()
    def context(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Context (B,L,width) in float32 of caption tokens (B,L)."""
        return self.text.encode(tokens, lengths).float()
