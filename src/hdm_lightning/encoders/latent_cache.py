"""An autoencoder that remembers: small sets show the same crops again and again.

Shapes: B batch, H×W image pixels, C latent channels, h×w latent.
"""

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from hdm_lightning.encoders.base import ImageAutoencoder


class CachedAutoencoder:
    """Wraps an autoencoder with a least-recently-used cache of latents in RAM, keyed by an image's pixels.

    Hashing takes about 0.1 ms for a 64-pixel image, and reads the image on the host: worth it on a CPU, for sets
    whose crops come back.

    Args:
        autoencoder: what encodes images not seen lately.
        size: latents remembered, at least 1.
    """

    def __init__(self, autoencoder: ImageAutoencoder, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}, expected at least 1")
        self.autoencoder = autoencoder
        self.size = size
        self.hits = 0
        self.misses = 0
        self._latents: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.autoencoder.channels

    @property
    def factor(self) -> int:
        """Image pixels per latent cell along one side."""
        return self.autoencoder.factor

    def to(self, device: torch.device | str) -> Self:
        """Move the autoencoder; the cache stays in RAM."""
        self.autoencoder.to(device)
        return self

    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Encode images; see `ImageAutoencoder.encode`. With noise, whose result is never the same, nothing is kept."""
        if noise is not None:
            return self.autoencoder.encode(image, noise=noise)
        keys = [hashlib.blake2b(row.numpy(), digest_size=16).digest() for row in image.cpu().contiguous()]
        missing = [row for row, key in enumerate(keys) if key not in self._latents]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        found = {key: self._latents[key] for key in keys if key in self._latents}
        if missing:
            fresh = self.autoencoder.encode(image[missing]).cpu()
            found |= {keys[row]: latent.clone() for row, latent in zip(missing, fresh, strict=True)}
        self._remember(found)
        return torch.stack([found[key] for key in keys]).to(image.device)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents; see `ImageAutoencoder.decode`."""
        return self.autoencoder.decode(latent)

    def save(self, folder: Path) -> None:
        """Save the autoencoder; see `ImageAutoencoder.save`."""
        self.autoencoder.save(folder)

    def _remember(self, latents: dict[bytes, Tensor]) -> None:
        for key, latent in latents.items():
            self._latents[key] = latent
            self._latents.move_to_end(key)
        while len(self._latents) > self.size:
            self._latents.popitem(last=False)
