"""Random draws of a training sample, from (seed, stage, index) only: never from rank, worker or restart.

B batch, C latent channels, H x W latent grid, N image tokens.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleDraws:
    """The random numbers of one batch.

    Attributes:
        noise: (B, C, H, W) standard normal.
        uniform: (B,) in [0, 1), for the time.
        scores: (B, N) in [0, 1), for the routing; None without routing.
    """

    noise: Tensor
    uniform: Tensor
    scores: Tensor | None


def sub_seed(*parts: int | str) -> int:
    """Hash the parts (BLAKE2b) to a 63-bit seed that is the same on every machine and Python version."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def draw(seed: int, stage: str, index: Tensor, latent_shape: tuple[int, int, int], tokens: int) -> SampleDraws:
    """Draw noise, time uniforms and (for `tokens` > 0) routing scores of each sample.

    Args:
        seed: the run's seed.
        stage: the stage's name.
        index: (B,) int64 positions in the stage's global order, on the CPU to avoid waiting for a device.
        latent_shape: (C, H, W).
        tokens: N, or 0 for no routing scores.

    The numbers are drawn on the CPU, so a run has the same noise on every kind of device.
    """
    batch = index.shape[0]
    noise = torch.empty((batch, *latent_shape))
    rest = torch.empty((batch, 1 + tokens))
    generator = torch.Generator()
    for row, sample in enumerate(index.tolist()):
        generator.manual_seed(sub_seed(seed, stage, sample))
        noise[row].normal_(generator=generator)
        rest[row].uniform_(generator=generator)
    return SampleDraws(noise, rest[:, 0], rest[:, 1:] if tokens else None)


def strata(seed: int, stage: str, index: Tensor, batch_size: int) -> Tensor:
    """Return the stratum (B,) of each sample's time within its global batch of `batch_size` samples.

    Every global batch contains each stratum once, in its own random order.
    """
    result = torch.empty_like(index)
    for step in torch.unique(index // batch_size).tolist():
        generator = torch.Generator().manual_seed(sub_seed(seed, stage, "strata", step))
        order = torch.randperm(batch_size, generator=generator)
        mine = index // batch_size == step
        result[mine] = order[index[mine] % batch_size]
    return result
