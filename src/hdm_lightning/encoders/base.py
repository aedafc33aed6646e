"""The two protocols behind which every frozen encoder stands: text to context, image to latent and back.

Encoders are plain objects, not submodules, so that they stay out of a training module's parameters, state dict and
train/eval switches; `to` moves them.

Shapes: B batch, L tokens, f spatial factor, C latent channels.
"""

from inspect import getattr_static
from pathlib import Path
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn

from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.precision import encoder_dtype


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen language model that gives one vector per token."""

    @property
    def width(self) -> int:
        """Size of the vectors, the context width of the network."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns captions into the tokens that this encoder knows."""

    def to(self, device: torch.device | str) -> Self:
        """Move the weights to a device and return the encoder."""

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Encode padded captions.

        Args:
            tokens: int64 (B, L), padded on the right.
            lengths: int64 (B,), true token counts, 1 … L; on the CPU, or wherever the host is not to wait for them.

        Returns:
            (B, L, width) on the device of `tokens`, in the encoder's dtype. Rows past a length are zero; the
            others do not depend on padding or on the rest of the batch.
        """


@runtime_checkable
class ImageAutoencoder(Protocol):
    """A frozen autoencoder with normalised latents."""

    @property
    def channels(self) -> int:
        """Latent channels C."""

    @property
    def factor(self) -> int:
        """Image pixels per latent cell along one side."""

    def to(self, device: torch.device | str) -> Self:
        """Move the weights to a device and return the autoencoder."""

    def encode(self, image: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            image: float (B, 3, H, W) in [−1, 1], H and W divisible by `factor`.
            noise: standard normal (B, C, H/f, W/f) to sample the posterior with; None takes its mean.

        Returns:
            float32 (B, C, H/f, W/f): (z − mean) / std per channel.
        """

    def decode(self, latent: Tensor) -> Tensor:
        """Decode normalised latents (B, C, h, w) to float32 images (B, 3, h·f, w·f) in [−1, 1]."""

    def save(self, folder: Path) -> None:
        """Write weights and normalisation to a folder, to be loaded by its path."""


class PosteriorAutoencoder(ImageAutoencoder, Protocol):
    """A frozen autoencoder whose posteriors can be kept on disk and used later as if it had just encoded."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that posteriors depend on besides the image: the same in any place and dtype."""

    def from_moments(self, moments: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """What `encode` gives, of mean and standard deviation of the posterior (B, 2, C, h, w), as it has them before
        it normalises, of any float dtype; without noise the mean (B, 1, C, h, w) is enough.
        """


def posteriors_of(autoencoder: ImageAutoencoder) -> PosteriorAutoencoder:
    """The autoencoder, which can take latents from disk.

    Raises:
        UserError: it has no such methods.
    """
    needed = ("fingerprint", "from_moments")
    # Looked for, not asked for: a fingerprint takes seconds.
    if any(getattr_static(autoencoder, name, None) is None for name in needed):
        what = f"{type(autoencoder).__name__} cannot use latents from disk: it lacks one of {', '.join(needed)}"
        raise UserError(what, where="autoencoder", hint="train on the images, or give it these methods")
    return cast(PosteriorAutoencoder, autoencoder)


class TextEncoderAround:
    """A text encoder around another one, whose width, tokenizer and device it has."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    @property
    def width(self) -> int:
        """Size of one token's vector."""
        return self.encoder.width

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the encoder."""
        return self.encoder.tokenizer

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder."""
        self.encoder.to(device)
        return self

    @property
    def fingerprint(self) -> str:
        """See `fingerprint_of`; UserError where the encoder has none."""
        return fingerprint_of(self.encoder)

    def compile_blocks(self) -> None:
        """Compile the encoder, if it can be."""
        compile_encoders(self.encoder)


def fingerprint_of(encoder: TextEncoder) -> str:
    """Hash of all that a text encoder's states depend on besides the tokens, which tells whether stored ones are its.

    Raises:
        UserError: it has none.
    """
    if getattr_static(encoder, "fingerprint", None) is None:
        what = f"{type(encoder).__name__} cannot use text states from disk: it has no fingerprint"
        raise UserError(what, where="text_encoder", hint="set data.text_states=null, or give it that property")
    return str(encoder.fingerprint)  # type: ignore[attr-defined]


def compile_encoders(*encoders: Any) -> None:
    """Compile the encoders of this project among these, block by block, for the shapes that come."""
    for encoder in encoders:
        if (compile_blocks := getattr(encoder, "compile_blocks", None)) is not None:
            compile_blocks()


def place(model: nn.Module, device: torch.device | str, *, auto: bool) -> None:
    """Move a frozen model to a device.

    Args:
        model: its parameters are all of one dtype.
        device: where to.
        auto: also cast the parameters to the dtype that suits the device. Buffers keep theirs: rotary frequencies
            lose too much by it.
    """
    if auto:
        dtype = encoder_dtype(torch.device(device))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device, dtype)
    model.to(device)
