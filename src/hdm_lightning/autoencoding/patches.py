"""Patches of the training images, cut on the latent grid: cheap steps before training on whole images.

Shapes: image (B,3,f·H,f·W); latent (B,C,H,W).
"""

import random

from hdm_lightning.autoencoding.transforms import Crop


def draw_patch(height: int, width: int, size: int, *, seed: int, samples_seen: int) -> Crop:
    """Return a size × size box (in latent cells) at a random position in a height × width latent.

    Args:
        height: latent rows.
        width: latent columns.
        size: side of the box, at most `height` and `width`.
        seed: the run's seed.
        samples_seen: samples seen by all ranks together so far; the same on every rank.
    """
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size: got {size} cells, expected 1…{min(height, width)} for a {height}×{width} latent")
    source = random.Random(f"vae patch {seed} {samples_seen}")
    return Crop(source.randint(0, height - size), source.randint(0, width - size), size, size)
