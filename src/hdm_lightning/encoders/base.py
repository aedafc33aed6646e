"""The protocols of all frozen encoders: text to context, image to latent and back.

Encoders are plain objects, not submodules, so they stay out of a training module's parameters, state dict and
train/eval switches; `to` moves them.

Shapes: B batch, L tokens, f spatial factor, C latent channels.
"""

import hashlib
from collections.abc import Iterable
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
    """A frozen language model that maps each token to a vector."""

    @property
    def width(self) -> int:
        """Size of the vectors, the context width of the network."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of this encoder's vocabulary."""

    def to(self, device: torch.device | str) -> Self:
        """Move the weights to a device and return the encoder."""

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Encode padded captions.

        Args:
            tokens: int64 (B, L), padded on the right.
            lengths: int64 (B,), true token counts, 1 … L; on the CPU, or on a device to spare the host a wait.

        Returns:
            (B, L, width) on the device of `tokens`, in the encoder's dtype. Rows past a length are zero; the
            others do not depend on padding or on the rest of the batch.
        """


@runtime_checkable
class ImageAutoencoder(Protocol):
    """A frozen autoencoder with normalized latents."""

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
            noise: standard normal (B, C, H/f, W/f) to sample the posterior with; None uses its mean.

        Returns:
            float32 (B, C, H/f, W/f): (z − mean) / std per channel.
        """

    def decode(self, latent: Tensor) -> Tensor:
        """Decode normalized latents (B, C, h, w) to float32 images (B, 3, h·f, w·f) in [−1, 1]."""

    def save(self, folder: Path) -> None:
        """Write weights and normalization to a folder that can be loaded by its path."""


class PosteriorAutoencoder(ImageAutoencoder, Protocol):
    """A frozen autoencoder whose posteriors can be stored on disk and used later in place of encoding."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that posteriors depend on besides the image; independent of path and dtype."""

    def from_moments(self, moments: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Compute the result of `encode` from the posterior's mean and standard deviation (B, 2, C, h, w), of any
        float dtype and not normalized; without noise the mean (B, 1, C, h, w) is enough.
        """


def posteriors_of(autoencoder: ImageAutoencoder) -> PosteriorAutoencoder:
    """Return the autoencoder as one that can use latents from disk. Raises UserError: it lacks the methods for that."""
    needed = ("fingerprint", "from_moments")
    # A static lookup, as computing a fingerprint takes seconds.
    if any(getattr_static(autoencoder, name, None) is None for name in needed):
        what = f"{type(autoencoder).__name__} cannot use latents from disk: it lacks one of {', '.join(needed)}"
        raise UserError(what, where="autoencoder", hint="train on the images, or add these methods")
    return cast(PosteriorAutoencoder, autoencoder)


class TextEncoderAround:
    """Base of text encoders that wrap another one and share its width, tokenizer and device."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    @property
    def width(self) -> int:
        """Size of one token's vector."""
        return self.encoder.width

    @property
    def tokenizer(self) -> Tokenizer:
        """The encoder's tokenizer."""
        return self.encoder.tokenizer

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder."""
        self.encoder.to(device)
        return self

    @property
    def fingerprint(self) -> str:
        """See `fingerprint_of`; UserError if the encoder has none."""
        return fingerprint_of(self.encoder)

    def compile_blocks(self) -> None:
        """Compile the encoder if it supports that."""
        compile_encoders(self.encoder)


def fingerprint_of(encoder: TextEncoder) -> str:
    """Return the hash of all that a text encoder's states depend on besides the tokens; it identifies stored states.

    Raises:
        UserError: the encoder has no fingerprint.
    """
    if getattr_static(encoder, "fingerprint", None) is None:
        what = f"{type(encoder).__name__} cannot use text states from disk: it has no fingerprint"
        raise UserError(what, where="text_encoder", hint="set data.text_states=null, or add that property")
    return str(encoder.fingerprint)  # type: ignore[attr-defined]


def hash_of(tensors: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    """Return the SHA-256, 32 hexadecimal digits, of a text and of named tensors in float32, in their order."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        plain = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"\n{name} {tuple(plain.shape)}\n".encode())
        digest.update(plain.numpy().data.cast("B"))
    return digest.hexdigest()[:32]


def compile_encoders(*encoders: Any) -> None:
    """Compile those encoders that support it, block by block, for each input shape."""
    for encoder in encoders:
        if (compile_blocks := getattr(encoder, "compile_blocks", None)) is not None:
            compile_blocks()


def place(model: nn.Module, device: torch.device | str, *, auto: bool) -> None:
    """Move a frozen model to a device.

    Args:
        model, device: all parameters of the model have the same dtype.
        auto: also cast the parameters to the dtype that suits the device. Buffers keep theirs: rotary frequencies
            would lose too much precision.
    """
    if auto:
        dtype = encoder_dtype(torch.device(device))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device, dtype)
    model.to(device)
