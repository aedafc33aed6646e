"""Measures of an autoencoder whose answers are known."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from hdm_lightning.autoencoding.transforms import Flip, QuarterTurn, Scale
from hdm_lightning.evaluation.autoencoder_equivariance import (
    CentredError,
    decoder_error,
    encoder_error,
    moved_psnr,
    psnr,
)
from hdm_lightning.evaluation.autoencoder_latents import LatentStatistics, radial_spectrum
from hdm_lightning.evaluation.autoencoder_measures import AutoencoderMeasures
from hdm_lightning.evaluation.autoencoder_pictures import principal_colours, sheet

FACTOR = 4


def pooled(image):
    return F.avg_pool2d(image, FACTOR)


def repeated(latent):
    return F.interpolate(latent, scale_factor=FACTOR, mode="nearest")


@pytest.fixture
def image():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_an_equivariant_autoencoder_has_no_error(image):
    for transform in (QuarterTurn(1), Flip(), Scale.uniform(Fraction(1, 2))):
        assert encoder_error(pooled, image, transform, FACTOR).max() < 1e-6
    for transform in (QuarterTurn(3), Flip()):
        assert decoder_error(repeated, pooled(image), transform, FACTOR).max() < 1e-6
        expected = psnr(repeated(pooled(image)), image)
        torch.testing.assert_close(moved_psnr(pooled, repeated, image, transform, FACTOR), expected)


def test_errors_of_an_encoder_and_a_decoder_that_add_a_fixed_pattern(image):
    """E(x) = pool(x) + p has the rotation error ‖τp − p‖ / ‖pool(τx) + p‖, and likewise for the decoder."""
    pattern = torch.zeros(1, 3, 8, 8)
    pattern[..., 0, 0] = 2.0

    def encode(pixels):
        return pooled(pixels) + pattern

    def decode(latent):
        return repeated(latent + pattern)

    turn = QuarterTurn(1)
    moved = torch.rot90(pooled(image), 1, (-2, -1))
    expected = math.sqrt(2 * 3) * 2.0 / (moved + pattern).flatten(1).norm(dim=1)
    torch.testing.assert_close(encoder_error(encode, image, turn, FACTOR), expected)
    reference = torch.rot90(pooled(image) + pattern, 1, (-2, -1)).flatten(1).norm(dim=1)
    torch.testing.assert_close(decoder_error(decode, pooled(image), turn, FACTOR), math.sqrt(2 * 3) * 2.0 / reference)


def test_psnr_of_a_known_error():
    target = torch.zeros(2, 3, 4, 4)
    output = torch.stack([target[0] + 0.2, target[1] - 3.0])  # the second is clipped to -1
    assert psnr(output, target).tolist() == pytest.approx([20.0, 20 * math.log10(2.0)], rel=1e-5)
    assert psnr(target, target).tolist() == [100.0, 100.0]


def test_latent_statistics_are_those_of_all_latents_at_once():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(6, 3, 5, 5, generator=generator) * torch.tensor([2.0, 0.5, 1e-4])[:, None, None] + 7
    log_variance = torch.full_like(mean, -2.0)
    statistics = LatentStatistics(3)
    for part in (slice(0, 1), slice(1, 6)):
        statistics.update(mean[part], log_variance[part])
    report = statistics.report()
    assert report.mean == pytest.approx(mean.double().mean((0, 2, 3)).tolist(), rel=1e-9)
    assert report.std == pytest.approx(mean.double().std((0, 2, 3), correction=0).tolist(), rel=1e-4)
    variance, noise = mean.double().var((0, 2, 3), correction=0), math.exp(-2.0)
    assert report.signal == pytest.approx((variance / (variance + noise)).tolist(), rel=1e-4)
    assert (report.dead_channels, report.images) == (1, 6)
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    assert report.kl == pytest.approx(kl.item(), rel=1e-5)


def test_spectrum_puts_a_wave_into_its_ring():
    columns = torch.arange(16.0)
    for cycles, ring in ((1, 0), (2, 1), (5, 4), (8, 7)):
        wave = torch.cos(2 * math.pi * cycles * columns / 16).expand(2, 3, 16, 16) + 4.0
        shares = radial_spectrum(wave, 8)
        assert shares[ring].item() == pytest.approx(1.0)
    white = radial_spectrum(torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 4)
    rows = torch.fft.fftfreq(16)
    radius = (rows[:, None].square() + rows[None].square()).sqrt()
    areas = [((radius > k / 8) & ((radius <= (k + 1) / 8) | (k == 3))).sum().item() / 255 for k in range(4)]
    assert white.tolist() == pytest.approx(areas, rel=0.05)


def measures():
    return AutoencoderMeasures(
        lambda pixels: (pooled(pixels), torch.full_like(pooled(pixels), -2.0)),
        repeated,
        channels=3,
        factor=FACTOR,
        transforms={"rotation": [QuarterTurn(1), QuarterTurn(2)], "scale": [Scale.uniform(Fraction(1, 2))]},
        perceptual=lambda first, second: (first - second).square().mean((1, 2, 3)),
        perceptual_name="l2",
    )


def test_a_report_over_batches_and_processes_is_that_of_all_images(image):
    together = measures()
    together.update(image)
    parts = [measures(), measures()]
    parts[0].update(image[:1])
    parts[1].update(torch.cat([image[1:], image[:1]]), torch.tensor([1.0, 1.0, 1.0, 0.0]))  # the last is a hole
    expected = together.report()
    packed = []
    parts[1].report(reduce=lambda values: packed.append(values.clone()) or values)
    pieces = iter(packed)
    combined = parts[0].report(reduce=lambda values: values + next(pieces))
    assert combined.keys() == expected.keys()
    spectrum = {name for name in expected if "spectrum" in name}
    assert {name: combined[name] for name in expected.keys() - spectrum} == pytest.approx(
        {name: expected[name] for name in expected.keys() - spectrum}, rel=1e-5
    )
    assert sum(combined[name] for name in spectrum) == pytest.approx(1.0)
    output = repeated(pooled(image))
    assert expected["reconstruction/psnr_db"] == pytest.approx(psnr(output, image).mean().item(), rel=1e-6)
    assert expected["reconstruction/l2"] == pytest.approx((output - image).square().mean().item(), rel=1e-6)
    assert expected["equivariance/encoder_rotation"] < 1e-6
    assert 0 < expected["reconstruction/ssim"] < 1


def test_ms_ssim_comes_where_the_picture_is_large_enough():
    large = torch.rand(1, 3, 176, 176, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = measures()
    found.update(large)
    assert found.report()["reconstruction/ms_ssim"] < 1
    small = measures()
    small.update(large[..., :168, :168])
    assert "reconstruction/ms_ssim" not in small.report()


def test_the_centred_error_knows_no_offset_and_no_scale():
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(8, 3, 16, 16, generator=generator)
    noise = 0.1 * torch.randn(8, 3, 16, 16, generator=generator)
    unrelated = torch.randn(8, 3, 16, 16, generator=generator)
    scale, offset = torch.tensor([1.0, 50.0, 0.01])[:, None, None], torch.tensor([0.0, 900.0, -3.0])[:, None, None]
    for change in (lambda values: values, lambda values: values * scale + offset):
        near, far = CentredError(3), CentredError(3)
        for part in (slice(0, 3), slice(3, 8)):
            near.update(change(latent + noise)[part], change(latent)[part])
            far.update(change(unrelated)[part], change(latent)[part])
        assert near.report() == pytest.approx(0.1, rel=0.03)
        assert far.report() == pytest.approx(math.sqrt(2), rel=0.03)


def test_a_picture_that_the_factor_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"34×32 px.*factor 4"):
        measures().update(torch.zeros(1, 3, 34, 32))


def test_principal_colours_follow_the_largest_spread():
    rows = torch.linspace(-1, 1, 8)[:, None].expand(8, 8)
    columns = torch.linspace(-1, 1, 8)[None, :].expand(8, 8)
    latent = torch.stack([0.1 * columns, 3 * rows, 0 * rows, 1 * columns.T.flip(0) * columns])[None]
    colours = principal_colours(latent)
    assert colours.shape == (1, 3, 8, 8)
    assert torch.allclose(colours[0, 0], (rows + 1) / 2, atol=0.02)
    assert principal_colours(latent[:, :2])[0, 2].eq(0.5).all()


def test_a_sheet_shows_what_an_equivariant_autoencoder_makes_alike(image):
    turn, half = QuarterTurn(1), Scale.uniform(Fraction(1, 2))
    drawn = sheet(pooled, repeated, image, [turn, half], FACTOR)
    assert drawn.shape == (3, 11 * 32, 4 * 32)
    rows = drawn.reshape(3, 11, 32, 4 * 32).movedim(1, 0)
    torch.testing.assert_close(rows[0, :, :, :32], (image[0] + 1) / 2)
    torch.testing.assert_close(rows[3, :, :, :32], (torch.rot90(image[0], 1, (1, 2)) + 1) / 2)
    for moved, of_moved in ((5, 6), (9, 10)):
        torch.testing.assert_close(rows[moved], rows[of_moved])
    assert not torch.allclose(rows[2], rows[5])
