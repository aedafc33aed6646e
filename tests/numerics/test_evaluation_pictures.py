"""Stretch and camera response on synthetic pictures whose transformation is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hdm_lightning.datasets.shapes import ShapesOptions, make_image
from hdm_lightning.metrics.bootstrap import Bootstrap
from hdm_lightning.metrics.geometric_response import (
    content_shift,
    displacement,
    log_anisotropy,
    luminance,
    overlap_correlation,
    shift_response,
    stretch_estimate,
    zoom_response,
)


def textures(count, height, width, seed=0, cell=6):
    """Smooth random pictures, uint8 (B,3,H,W), with details of about `cell` pixels."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // cell + 4, width // cell + 4, generator=random)
    fine = F.interpolate(coarse, scale_factor=cell, mode="bicubic", align_corners=False)
    top, left = (fine.shape[2] - height) // 2, (fine.shape[3] - width) // 2
    return to_uint8(fine[:, :, top : top + height, left : left + width])


def to_uint8(values):
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def shapes(count):
    options = ShapesOptions(resolution=64, encoding="png")
    arrays = [make_image(options, index)[0] for index in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def test_displacements_of_windows_into_larger_pictures_are_found():
    large = textures(6, 96, 120)
    before = large[:, :, 20:70, 30:100]
    for down, right in ((0, 12), (9, 0), (-7, -15), (0, 0)):
        after = large[:, :, 20 - down : 70 - down, 30 - right : 100 - right]
        expected = torch.tensor([[down, right]]).double().expand(6, 2)
        torch.testing.assert_close(displacement(before, after), expected, atol=0.15, rtol=0)


def test_half_pixels_are_found():
    large = textures(4, 192, 192, cell=20)
    before, after = (F.avg_pool2d(large[:, :, :, s : s + 160].float(), 2).round().to(torch.uint8) for s in (10, 3))
    torch.testing.assert_close(displacement(before, after)[:, 1], torch.full((4,), 3.5).double(), atol=0.1, rtol=0)


def test_correlation_of_overlaps_is_the_correlation_coefficient():
    random = torch.Generator().manual_seed(3)
    before, after = torch.rand(2, 1, 7, 9, generator=random, dtype=torch.float64)
    score = overlap_correlation(before, after)
    for y, x in ((0, 0), (2, 3), (-3, 4), (-1, -5)):
        fixed = before[0, max(0, -y) : 7 - max(0, y), max(0, -x) : 9 - max(0, x)].numpy()
        moved = after[0, max(0, y) : 7 + min(0, y), max(0, x) : 9 + min(0, x)].numpy()
        expected = np.corrcoef(fixed.ravel(), moved.ravel())[0, 1]
        assert float(score[0, y, x]) == pytest.approx(expected, rel=1e-3)


def test_responses_tell_moved_from_still_and_from_moved_elsewhere():
    large = textures(5, 96, 96)
    before = large[:, :, 16:80, 16:80]
    stated = content_shift((0.0, 0.5), 64, 64)  # camera to the right by a quarter of the width: content goes left
    assert stated == (0.0, -16.0)
    right = shift_response(before, large[:, :, 16:80, 32:96], stated)
    torch.testing.assert_close(right, torch.tensor([[1.0, 0.0]]).double().expand(5, 2), atol=0.02, rtol=0)
    torch.testing.assert_close(shift_response(before, before, stated), torch.zeros(5, 2).double(), atol=0.01, rtol=0)
    down = shift_response(before, large[:, :, 32:96, 16:80], stated)
    assert down[:, 0].abs().max() < 0.02
    torch.testing.assert_close(down[:, 1].abs(), torch.ones(5).double(), atol=0.02, rtol=0)


def test_shapes_on_plain_grounds_are_followed():
    pictures = shapes(16)
    moved = pictures.roll((0, -8), (2, 3))
    found = shift_response(pictures, moved, (0.0, -8.0))
    assert ((found[:, 0] - 1).abs() < 0.25).float().mean() >= 0.9


@pytest.mark.parametrize("zoom", [1.25, 1.5, 0.8])
def test_zooms_are_found(zoom):
    large = textures(5, 160, 160, cell=12)
    before = large[:, :, 48:112, 48:112]
    reach = 32 / zoom  # half the side that the nearer camera sees
    lines = (torch.linspace(-reach, reach, 65)[:-1] + reach / 64) / 80
    grid = torch.stack(torch.meshgrid(lines, lines, indexing="ij")[::-1], dim=-1).expand(5, 64, 64, 2)
    after = to_uint8(F.grid_sample(large.float() / 255, grid, align_corners=False))
    torch.testing.assert_close(zoom_response(before, after, zoom), torch.ones(5), atol=0.15, rtol=0)
    torch.testing.assert_close(zoom_response(before, before, zoom), torch.zeros(5), atol=0.05, rtol=0)


def test_flat_pictures_say_nothing_and_break_nothing():
    flat = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    assert displacement(flat, flat).isfinite().all()
    assert zoom_response(flat, flat, 1.5).isfinite().all()
    assert torch.equal(log_anisotropy(flat), torch.zeros(2))


def test_stretched_textures_give_their_stretch():
    squares = textures(24, 128, 128, cell=10)
    estimates = {}
    for stretch in (0.5, 1.5, 2.0):
        width = round(128 * stretch)
        pulled = to_uint8(F.interpolate(squares.float() / 255, (128, width), mode="bicubic", antialias=True))
        estimates[stretch] = stretch_estimate(pulled, squares, Bootstrap(resamples=200))
    for stretch, found in estimates.items():
        assert found.value == pytest.approx(stretch, rel=0.05)
    wide = stretch_estimate(textures(24, 128, 256, seed=9, cell=10), squares, Bootstrap(resamples=400))
    assert wide.low < 1.0 < wide.high
    assert wide.high - wide.low < 0.2


def test_what_does_not_fit_is_named():
    pictures = textures(2, 16, 16)
    with pytest.raises(ValueError, match="squares: got 1 for 2 images"):
        stretch_estimate(pictures, pictures[:1], Bootstrap())
    with pytest.raises(ValueError, match="zoom: got 1"):
        zoom_response(pictures, pictures, 1.0)
    with pytest.raises(ValueError, match="reach"):
        displacement(pictures, pictures, reach=1.0)
    assert float(luminance(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))) == pytest.approx(1.0)
