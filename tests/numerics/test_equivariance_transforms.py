"""Transforms against a linear encoder for which the answer is known: mean pooling over f×f cells."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hdm_lightning.autoencoding.transforms import (
    Crop,
    Flip,
    QuarterTurn,
    Scale,
    Sequential,
    exact_scales,
)

FACTOR = 4


def encode(image):
    """Mean pooling commutes with everything that permutes whole cells."""
    return F.avg_pool2d(image, FACTOR)


def random_image(height=8, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, height * FACTOR, width * FACTOR, generator=generator, dtype=torch.float64)


def ramp(height=8, width=12):
    """An affine function of the coordinates, which mean pooling and bilinear sampling both keep exactly."""
    rows = torch.arange(height * FACTOR, dtype=torch.float64)[:, None]
    columns = torch.arange(width * FACTOR, dtype=torch.float64)[None, :]
    return torch.stack([0.3 * rows - 0.7 * columns + 1, rows + 0.1 * columns, 2 - columns + 0 * rows])[None]


def moved_pair(transform, image):
    """The transform of an image and that of its latent."""
    return transform(image, FACTOR), transform(encode(image))


def commutes(transform, image, tolerance=1e-12):
    moved_image, moved_latent = moved_pair(transform, image)
    assert moved_image.shape[-2:] == tuple(FACTOR * side for side in moved_latent.shape[-2:])
    return torch.allclose(encode(moved_image), moved_latent, rtol=0, atol=tolerance)


PERMUTATIONS = [
    *(QuarterTurn(turns) for turns in range(-1, 5)),
    Flip(),
    Crop(2, 5, 4, 3),
    Crop(0, 0, 8, 12),
    Sequential((Crop(1, 1, 6, 7), QuarterTurn(1), Flip(), QuarterTurn(3), Crop(0, 2, 3, 4))),
    Sequential(),
]


@pytest.mark.parametrize("transform", PERMUTATIONS, ids=str)
def test_what_moves_whole_cells_commutes_on_any_image(transform):
    assert commutes(transform, random_image())


def test_bilinear_halving_is_mean_pooling_and_commutes_on_any_image():
    half, whole = Fraction(1, 2), Fraction(1)
    for scale in (Scale.uniform(half), Scale(half, whole), Scale(whole, half)):
        assert commutes(scale, random_image())
    image = random_image()
    assert torch.allclose(Scale.uniform(half)(image, FACTOR), F.avg_pool2d(image, 2), rtol=0, atol=1e-12)


@given(
    st.sampled_from([Fraction(n, 8) for n in range(2, 9)]),
    st.sampled_from([Fraction(n, 12) for n in range(3, 13)]),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_downscaling_commutes_on_a_ramp(vertical, horizontal, turns, flip):
    transform = Sequential((Scale(vertical, horizontal), QuarterTurn(turns), *([Flip()] if flip else [])))
    image = ramp()
    moved_image = transform(image, FACTOR)
    height, width = int(8 * vertical) * FACTOR, int(12 * horizontal) * FACTOR
    assert moved_image.shape[-2:] == ((width, height) if turns % 2 else (height, width))
    assert commutes(transform, image, 1e-10)


def test_a_random_image_tells_scaling_from_pooling():
    assert not commutes(Scale.uniform(Fraction(1, 4)), random_image(8, 8), 1e-3)


def test_scaling_samples_where_torch_says():
    image = ramp(2, 2)
    small = Scale.uniform(Fraction(1, 2))(image, FACTOR)
    # Output pixel (i, j) lies at (2i + 1/2, 2j + 1/2) of the source.
    expected = torch.stack([image[0, :, 2 * i : 2 * i + 2, 2:4].mean((1, 2)) for i in range(4)], 1)
    assert torch.allclose(small[0, :, :, 1], expected, rtol=0, atol=1e-12)


def test_composition_is_applied_first_to_last():
    image = random_image(4, 4)
    by_hand = torch.rot90(image[..., : 2 * FACTOR, :], 1, (-2, -1))
    assert torch.equal(Sequential((Crop(0, 0, 2, 4), QuarterTurn(1)))(image, FACTOR), by_hand)


def test_a_size_that_would_not_be_whole_is_refused():
    with pytest.raises(ValueError, match="not a whole size"):
        Scale.uniform(Fraction(3, 5))(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="not a whole number of cells"):
        Crop(0, 0, 1, 1)(torch.zeros(1, 3, 30, 32), FACTOR)
    with pytest.raises(ValueError, match="is not inside a grid"):
        Crop(6, 0, 3, 3)(torch.zeros(1, 4, 8, 8))


def test_exact_scales_are_those_of_the_paper_at_a_latent_of_32():
    assert exact_scales(32, range(8, 32), 32) == [Fraction(n, 32) for n in range(8, 32)]
    assert exact_scales(8, range(8, 32), 32) == [Fraction(n, 8) for n in range(2, 8)]
    assert exact_scales(7, range(1, 8), 8) == []


def pillow_resized(channel, height, width):
    picture = Image.fromarray(channel.float().numpy()).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).double()


@pytest.mark.parametrize(("vertical", "horizontal"), [("1/4", "1/4"), ("3/4", "3/4"), ("1/2", "7/8")])
def test_scaling_with_antialias_is_pillows(vertical, horizontal):
    image = random_image(8, 8)
    small = Scale(Fraction(vertical), Fraction(horizontal), antialias=True)(image, FACTOR)
    expected = torch.stack([pillow_resized(channel, *small.shape[-2:]) for channel in image.flatten(0, 1)])
    assert torch.allclose(small.flatten(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_antialias_in_half_precision_is_that_of_float32_rounded(dtype):
    latent = random_image(2, 2).to(dtype)
    scale = Scale.uniform(Fraction(3, 4), antialias=True)
    assert torch.equal(scale(latent), scale(latent.float()).to(dtype))


def test_every_pixel_counts_with_antialias_and_three_of_four_do_not_without():
    image = torch.zeros(1, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    for antialias, counted in ((True, 256), (False, 64)):
        (gradient,) = torch.autograd.grad(Scale.uniform(Fraction(1, 4), antialias)(image, FACTOR).sum(), image)
        assert int((gradient > 0).sum()) == counted


def test_antialias_brings_pooling_closer_to_commuting_where_pixels_would_be_skipped():
    image = random_image(8, 8)
    quarter = Fraction(1, 4)
    errors = {}
    for antialias in (True, False):
        moved_image, moved_latent = moved_pair(Scale.uniform(quarter, antialias), image)
        errors[antialias] = (encode(moved_image) - moved_latent).square().mean().sqrt()
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("fraction", ["1/4", "1/2"])
def test_antialiased_scaling_commutes_exactly_on_a_ramp_away_from_the_edges(fraction):
    """A symmetric filter keeps an affine function: where the ratio is whole, and away from the edges, which cut it."""
    image, scale = ramp(16, 16), Scale.uniform(Fraction(fraction), antialias=True)
    moved_image, moved_latent = moved_pair(scale, image)
    edge = 1
    inner = (..., slice(edge, -edge), slice(edge, -edge))
    assert torch.allclose(encode(moved_image)[inner], moved_latent[inner], rtol=0, atol=1e-10)
    flat = torch.full_like(image, 0.3)
    assert commutes(scale, flat)
