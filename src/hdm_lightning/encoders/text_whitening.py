"""Whitened text-encoder states: zero mean and about the same variance in every direction.

The states of a small text encoder share a large mean and differ along few directions. The words that distinguish
captions therefore change them little, and a network trained on them is slow to learn what depends on those words. The
map is affine, so it folds into the network's own text projection, and a finished model reads the plain states again.

Shapes: N rows, B batch, L tokens, D width of the text encoder, W width of the network.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hdm_lightning.encoders.base import TextEncoder, TextEncoderAround

RIDGE = 0.02
"""Added to each variance, as a fraction of the largest: directions far below it stay small."""


@dataclass(frozen=True)
class TextWhitening:
    """x ↦ (x − mean) · matrix, with a symmetric matrix (ZCA: the whitening map closest to the identity).

    Attributes:
        mean: float64 (D,).
        matrix: float64 (D,D), symmetric and positive definite.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def measure(cls, rows: Tensor, ridge: float = RIDGE) -> Self:
        """Estimate from states (N,D) of tokens, N at least 2. Raises ValueError: too few rows, or all are equal."""
        if rows.dim() != 2 or len(rows) < 2:
            raise ValueError(f"rows: got {tuple(rows.shape)}, expected (N, D) with N of at least 2")
        rows = rows.double()
        variances, directions = torch.linalg.eigh(torch.cov(rows.T))
        greatest = variances.max()
        if not greatest > 0:
            raise ValueError("rows: all are the same, so there are no directions to scale")
        scales = (variances.clamp(min=0) + ridge * greatest).rsqrt()
        return cls(rows.mean(0), directions * scales @ directions.T)

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on a device."""
        return replace(self, mean=self.mean.to(device), matrix=self.matrix.to(device))

    def apply(self, states: Tensor) -> Tensor:
        """Whiten states (…,D), keeping their dtype; computed in at least float32, also under autocast."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        mean, matrix = self.mean.to(states.device, dtype), self.matrix.to(states.device, dtype)
        with torch.autocast(states.device.type, enabled=False):
            return ((states.to(dtype) - mean) @ matrix).to(states.dtype)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear layer (W,D), (W,) that does on plain states what the given one does on whitened states."""
        plain = weight.double().cpu() @ self.matrix
        return plain.to(weight), (bias.double().cpu() - plain @ self.mean).to(bias)

    def unfold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear layer that does on whitened states what the given one does on plain states."""
        plain = weight.double().cpu()
        whitened = torch.linalg.solve(self.matrix, plain.T).T
        return whitened.to(weight), (bias.double().cpu() + plain @ self.mean).to(bias)

    def to_bytes(self) -> bytes:
        """Return the contents of a safetensors file."""
        return save({"mean": self.mean.contiguous(), "matrix": self.matrix.contiguous()})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load a file with the contents of `to_bytes`."""
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["matrix"])


class WhitenedTextEncoder(TextEncoderAround):
    """A text encoder with whitened states; rows past a caption's length stay zero."""

    def __init__(self, encoder: TextEncoder, whitening: TextWhitening) -> None:
        if whitening.mean.shape != (encoder.width,):
            raise ValueError(f"whitening: got mean {tuple(whitening.mean.shape)}, expected ({encoder.width},)")
        super().__init__(encoder)
        self.whitening = whitening
        self._placed = whitening

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder, and a copy of the whitening with it."""
        self._placed = self.whitening.to(device)
        return super().to(device)

    @property
    def fingerprint(self) -> str:
        """See `fingerprint_of`; differs from that of the plain states."""
        return hashlib.sha256(super().fingerprint.encode() + self.whitening.to_bytes()).hexdigest()[:32]

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return whitened states (B,L,D); see `TextEncoder.encode`."""
        states = self._placed.apply(self.encoder.encode(tokens, lengths))
        padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths.unsqueeze(1)
        return states.masked_fill(padding.unsqueeze(-1), 0)
