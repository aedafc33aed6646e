"""Posterior noise that belongs to the sample, not to the rank or the step that happens to meet it.

Shapes: index (B,) int64, positions in the global order of samples; noise (B,C,h,w), standard normal.
"""

import hashlib

import torch
from torch import Tensor


def posterior_noise(index: Tensor, shape: tuple[int, ...], *, seed: int, purpose: str = "posterior") -> Tensor:
    """Return standard normal noise (B, *shape), float32 on the CPU, that depends on (seed, purpose, index) alone.

    Args:
        index: the samples' positions in the global order (B,).
        shape: shape of one sample's noise, such as (C, h, w).
        seed: the run's seed.
        purpose: separates this use of the seed from others.
    """
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(_hash(purpose, seed, position)))
            for position in index.tolist()
        ]
    )


def _hash(purpose: str, seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{purpose} {seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
