"""The cache of latents gives what the autoencoder gives, and asks it once per picture."""

import pytest
import torch

from hdm_lightning.encoders.caches import CachedAutoencoder


class Halves:
    """An autoencoder that keeps every other pixel and counts what it is asked."""

    channels, factor = 3, 2

    def __init__(self):
        self.asked = 0

    def encode(self, image, *, noise=None):
        self.asked += len(image)
        latent = image[:, :, ::2, ::2]
        return latent if noise is None else latent + noise

    def decode(self, latent):
        return latent.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_latents_are_those_of_the_autoencoder_and_asked_for_once():
    inner = Halves()
    cached = CachedAutoencoder(inner, size=10)
    images = torch.randn(4, 3, 8, 8)
    for order in ([0, 1, 2], [2, 0], [3, 1, 1]):
        assert torch.equal(cached.encode(images[order]), Halves().encode(images[order]))
    assert inner.asked == 4
    assert (cached.hits, cached.misses) == (4, 4)


def test_a_change_of_one_pixel_is_another_picture():
    cached = CachedAutoencoder(Halves(), size=10)
    image = torch.zeros(1, 3, 8, 8)
    cached.encode(image)
    image[0, 0, 0, 0] = 1e-7
    assert cached.encode(image)[0, 0, 0, 0] == image[0, 0, 0, 0]


def test_the_oldest_latents_are_forgotten_and_noise_is_never_kept():
    inner = Halves()
    cached = CachedAutoencoder(inner, size=2)
    images = torch.randn(3, 3, 4, 4)
    for row in (0, 1, 2, 0):
        cached.encode(images[row : row + 1])
    assert inner.asked == 4
    noise = torch.ones(1, 3, 2, 2)
    assert torch.equal(cached.encode(images[:1], noise=noise), images[:1, :, ::2, ::2] + 1)
    assert inner.asked == 5


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="size: got 0"):
        CachedAutoencoder(Halves(), size=0)
