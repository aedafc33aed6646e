"""Encoders with a cache, for small sets, whose captions and crops come back again and again.

Shapes: B batch, L tokens, H×W image pixels, C latent channels.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from hdm_lightning.encoders.base import (
    ImageAutoencoder,
    TextEncoder,
    TextEncoderAround,
    compile_encoders,
    posteriors_of,
)

Key = TypeVar("Key")


class _Recent(Generic[Key]):
    """A least-recently-used cache of tensors in RAM.

    Attributes:
        size: maximum number of tensors, at least 1.
        hits, misses: number of lookups that found their tensor, and that did not.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size: got {size}, expected at least 1")
        self.size = size
        self.hits = self.misses = 0
        self._tensors: OrderedDict[Key, Tensor] = OrderedDict()

    def _through(self, keys: list[Key], compute: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """Return the tensor of each key, computing those of the rows that are not in the cache."""
        found = [self._tensors.get(key) for key in keys]
        missing = [row for row, tensor in enumerate(found) if tensor is None]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        # Copies, as a view would keep the tensor of the whole batch.
        fresh = {row: each.clone() for row, each in zip(missing, compute(missing), strict=True)} if missing else {}
        tensors = [fresh[row] if tensor is None else tensor for row, tensor in enumerate(found)]
        for key, tensor in zip(keys, tensors, strict=True):
            self._tensors[key] = tensor
            self._tensors.move_to_end(key)
            if len(self._tensors) > self.size:
                self._tensors.popitem(last=False)
        return tensors


class CachedTextEncoder(TextEncoderAround, _Recent[tuple[int, ...]]):
    """Wraps a text encoder with a least-recently-used cache of `size` captions in RAM, keyed by their token ids.

    Encodings are kept in the encoder's dtype and without padding: length × width numbers per caption.
    """

    def __init__(self, encoder: TextEncoder, size: int) -> None:
        TextEncoderAround.__init__(self, encoder)
        _Recent.__init__(self, size)

    def compile_blocks(self) -> None:
        """Do nothing: any number of captions may be missing, and each would need its own graphs."""

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Encode captions; see `TextEncoder.encode`. Reads tokens and lengths on the host, so best given there."""
        counts: list[int] = lengths.tolist()
        keys = [tuple(row[:count]) for row, count in zip(tokens.tolist(), counts, strict=True)]

        def compute(rows: list[int]) -> list[Tensor]:
            states = self.encoder.encode(tokens[rows], lengths[rows]).cpu()
            return [each[: counts[row]] for row, each in zip(rows, states, strict=True)]

        encodings = self._through(keys, compute)
        dtype = encodings[0].dtype if encodings else torch.float32
        context = torch.zeros(*tokens.shape, self.width, dtype=dtype)
        for row, encoding in enumerate(encodings):
            context[row, : len(encoding)] = encoding
        return context.to(tokens.device)


class CachedAutoencoder(_Recent[bytes]):
    """Wraps an autoencoder with a least-recently-used cache of `size` latents in RAM, keyed by an image's pixels.

    Hashing takes about 0.1 ms for a 64-pixel image: worth it on a CPU, for sets whose crops come back.
    """

    def __init__(self, autoencoder: ImageAutoencoder, size: int) -> None:
        super().__init__(size)
        self.autoencoder = autoencoder

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

    def compile_blocks(self) -> None:
        """Compile the autoencoder if it supports that, for devices other than a CPU, where nothing is cached."""
        compile_encoders(self.autoencoder)

    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Encode images; see `ImageAutoencoder.encode`.

        Nothing is cached with noise, as results never repeat, and on a device other than a CPU: the host would wait
        for the pixels, and any number of images may be missing, each of which would need its own compiled graphs.
        """
        if noise is not None or image.device.type != "cpu":
            return self.autoencoder.encode(image, noise=noise)
        keys = [hashlib.blake2b(row.numpy(), digest_size=16).digest() for row in image.cpu().contiguous()]
        latents = self._through(keys, lambda rows: self.autoencoder.encode(image[rows]).cpu())
        return torch.stack(latents).to(image.device)

    @property
    def fingerprint(self) -> str:
        """See `PosteriorAutoencoder.fingerprint`; UserError if the autoencoder has none."""
        return posteriors_of(self.autoencoder).fingerprint

    def from_moments(self, moments: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """See `PosteriorAutoencoder.from_moments`."""
        return posteriors_of(self.autoencoder).from_moments(moments, noise=noise)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents; see `ImageAutoencoder.decode`."""
        return self.autoencoder.decode(latent)

    def save(self, folder: Path) -> None:
        """Save the autoencoder; see `ImageAutoencoder.save`."""
        self.autoencoder.save(folder)
