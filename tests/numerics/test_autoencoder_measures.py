"""Measures of an autoencoder whose answers are known."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from hdm_lightning.autoencoding.transforms import Flip, QuarterTurn, Scale
from hdm_lightning.metrics.autoencoder_quality import SMALLEST_SIDE, AutoencoderMeasures, CentredError, psnr
from hdm_lightning.metrics.latents import LatentStatistics, principal_colours, radial_power, sheet

FACTOR = 4


def pooled(image):
    return F.avg_pool2d(image, FACTOR)


def repeated(latent):
    return F.interpolate(latent, scale_factor=FACTOR, mode="nearest")


@pytest.fixture
def image():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def measures(encode=pooled, decode=repeated, **transforms):
    """Measures of an autoencoder with a posterior's log-variance of −2."""
    return AutoencoderMeasures(
        lambda pixels: (encode(pixels), torch.full_like(encode(pixels), -2.0)),
        decode,
        channels=3,
        factor=FACTOR,
        transforms={name: dict(zip("abc", each, strict=False)) for name, each in transforms.items()},
        perceptual=lambda first, second: (first - second).square().mean((1, 2, 3)),
        perceptual_name="l2",
    )


def test_an_equivariant_autoencoder_has_no_error(image):
    for transform in (QuarterTurn(1), QuarterTurn(3), Flip(), Scale.uniform(Fraction(1, 2))):
        found = measures(moved=[transform]).update(image)
        assert found["equivariance/encoder_moved"].max() < 1e-6
        if not isinstance(transform, Scale):  # repeating pixels does not commute with a bilinear resize
            assert found["equivariance/decoder_moved"].max() < 1e-6
            torch.testing.assert_close(found["equivariance/psnr_db_moved"], found["reconstruction/psnr_db"])


def test_errors_of_an_encoder_and_a_decoder_that_add_a_fixed_pattern(image):
    """E(x) = pool(x) + p has the rotation error ‖τp − p‖ / ‖pool(τx) + p‖, and likewise for the decoder."""
    pattern = torch.zeros(1, 3, 8, 8)
    pattern[..., 0, 0] = 2.0
    turn = QuarterTurn(1)
    moved = torch.rot90(pooled(image), 1, (-2, -1))
    found = measures(encode=lambda pixels: pooled(pixels) + pattern, turned=[turn]).update(image)
    expected = math.sqrt(2 * 3) * 2.0 / (moved + pattern).flatten(1).norm(dim=1)
    torch.testing.assert_close(found["equivariance/encoder_turned"], expected)

    found = measures(decode=lambda latent: repeated(latent + pattern), turned=[turn]).update(image)
    reference = torch.rot90(pooled(image) + pattern, 1, (-2, -1)).flatten(1).norm(dim=1)
    torch.testing.assert_close(found["equivariance/decoder_turned"], math.sqrt(2 * 3) * 2.0 / reference)
    expected = psnr(repeated(moved + pattern), torch.rot90(image, 1, (-2, -1)))
    torch.testing.assert_close(found["equivariance/psnr_db_turned"], expected)


def test_each_transform_of_a_group_has_the_encoders_error_under_its_own_name(image):
    """A pattern in the top row of the latent is moved by a turn and not by a left-right mirror."""
    pattern = torch.zeros(1, 3, 8, 8)
    pattern[..., 0, :] = 2.0
    turns = (QuarterTurn(1), Flip())
    found = measures(encode=lambda pixels: pooled(pixels) + pattern, moved=turns).update(image)
    alone = [measures(encode=lambda pixels: pooled(pixels) + pattern, moved=[turn]).update(image) for turn in turns]
    first, second = found["equivariance/encoder_moved_a"], found["equivariance/encoder_moved_b"]
    assert first.min() > 0.1 and second.max() < 1e-6
    torch.testing.assert_close(first, alone[0]["equivariance/encoder_moved"])
    torch.testing.assert_close(found["equivariance/encoder_moved"], (first + second) / 2)


def test_ssim_of_flat_pictures_is_its_comparison_of_means_on_0_to_1():
    """Without variance SSIM is (2ab + c) / (a² + b² + c), c = 0.01² (Wang et al. 2004, equation 6)."""
    dark, light = 0.25, 0.5
    expected = (2 * dark * light + 1e-4) / (dark**2 + light**2 + 1e-4)
    flat = torch.full((1, 3, 32, 32), 2 * dark - 1)
    found = measures(decode=lambda latent: torch.full_like(repeated(latent), 2 * light - 1)).update(flat)
    assert found["reconstruction/ssim"].item() == pytest.approx(expected, rel=1e-4)


def test_nothing_measured_is_no_report():
    with pytest.raises(ValueError, match="no latent was added"):
        measures().report()


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
        power = radial_power(wave, 8)
        shares = power / power.sum()
        assert shares[ring].item() == pytest.approx(1.0)
    white = radial_power(torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 4)
    white /= white.sum()
    rows = torch.fft.fftfreq(16)
    radius = (rows[:, None].square() + rows[None].square()).sqrt()
    areas = [((radius > k / 8) & ((radius <= (k + 1) / 8) | (k == 3))).sum().item() / 255 for k in range(4)]
    assert white.tolist() == pytest.approx(areas, rel=0.05)


def turned_and_halved():
    return measures(rotation=[QuarterTurn(1), QuarterTurn(2)], scale=[Scale.uniform(Fraction(1, 2))])


@pytest.mark.parametrize("split", [0, 1], ids=["none and 4", "1 and 3"])
def test_a_report_over_batches_and_processes_is_that_of_all_images(image, split):
    together = turned_and_halved()
    together.update(image)
    parts = [turned_and_halved(), turned_and_halved()]
    for part, images in zip(parts, (image[:split], image[split:]), strict=True):
        part.update(torch.cat([images, image[:1]]), torch.tensor([1.0] * len(images) + [0.0]))  # the last is a hole
    expected = together.report()
    packed = []
    parts[1].report(reduce=lambda values: packed.append(values.clone()) or values)
    pieces = iter(packed)
    combined = parts[0].report(reduce=lambda values: values + next(pieces))
    assert combined == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert sum(value for name, value in combined.items() if "spectrum" in name) == pytest.approx(1.0)
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
    with pytest.raises(ValueError, match=r"34×32 px.*multiples of 4"):
        measures().update(torch.zeros(1, 3, 34, 32))


def test_principal_colours_follow_the_largest_spread():
    rows = torch.linspace(-1, 1, 8)[:, None].expand(8, 8)
    columns = torch.linspace(-1, 1, 8)[None, :].expand(8, 8)
    latent = torch.stack([0.1 * columns, 3 * rows, 0 * rows, 1 * columns.T.flip(0) * columns])[None]
    (colours,) = principal_colours([latent])
    assert colours.shape == (1, 3, 8, 8)
    assert torch.allclose(colours[0, 0], (rows + 1) / 2, atol=0.02)
    assert principal_colours([latent[:, :2]])[0][0, 2].eq(0.5).all()


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


def test_every_measure_can_be_taken_from_the_smallest_side_on():
    values = torch.rand(2, 3, SMALLEST_SIDE, SMALLEST_SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    identity = AutoencoderMeasures(
        lambda pixels: (pixels, torch.zeros_like(pixels)), lambda latent: latent, channels=3, factor=1, transforms={}
    )
    assert torch.allclose(identity.update(values)["reconstruction/ssim"], torch.ones(2))
    with pytest.raises((ValueError, RuntimeError)):
        identity.update(values[..., 1:, 1:])
