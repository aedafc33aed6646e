"""The draw of branches and transforms, and what each branch asks of the decoder."""

from collections import Counter
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from hdm_lightning.autoencoding.branches import Branch, BranchSettings, Draw, draw_branch, draw_patch
from hdm_lightning.autoencoding.reconstruction import Posterior, reconstruct
from hdm_lightning.autoencoding.transforms import Flip, QuarterTurn, Scale, Sequential

TRIALS = 4000


def draws(settings, seed=0, size=32):
    return [draw_branch(settings, size, size, seed=seed, samples_seen=16 * step) for step in range(TRIALS)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (BranchSettings(), (0.5, 0.125, 0.375)),
        (BranchSettings.anime(), (0.65, 0.0, 0.35)),
        (BranchSettings.off(), (0.0, 0.0, 1.0)),
    ],
    ids=["paper", "anime", "off"],
)
def test_branches_come_with_their_probabilities(settings, expected):
    counts = Counter(draw.branch for draw in draws(settings))
    for branch, probability in zip(Branch, expected, strict=True):
        # Five standard deviations of a binomial share.
        assert abs(counts[branch] / TRIALS - probability) <= 5 * (probability * (1 - probability) / TRIALS) ** 0.5


def test_the_papers_transforms_are_drawn_evenly():
    found = [draw.transform.steps for draw in draws(BranchSettings()) if draw.branch is Branch.EQUIVARIANT]
    scales = Counter(steps[0].vertical for steps in found)
    turns = Counter(steps[1].turns for steps in found)
    assert all(steps[0].vertical == steps[0].horizontal and len(steps) == 2 for steps in found)
    assert set(scales) == {Fraction(n, 32) for n in range(8, 32)}
    assert set(turns) == {1, 2, 3}
    assert max(scales.values()) < 2 * min(scales.values())
    assert max(turns.values()) < 1.2 * min(turns.values())


def test_anisotropy_and_flips_are_drawn_where_asked_for():
    settings = BranchSettings(equivariant=1.0, downscaled=0.0, anisotropic=True, flips=True)
    found = [draw.transform.steps for draw in draws(settings)]
    assert any(steps[0].vertical != steps[0].horizontal for steps in found)
    assert 0.45 < sum(isinstance(steps[-1], Flip) for steps in found) / TRIALS < 0.55


def test_every_scale_that_is_drawn_has_antialias_where_asked_for():
    for antialias in (True, False):
        for anisotropic in (True, False):
            settings = BranchSettings(0.5, 0.5, antialias=antialias, anisotropic=anisotropic)
            steps = [getattr(draw.transform, "steps", [draw.transform])[0] for draw in draws(settings)[:100]]
            assert {scale.antialias for scale in steps} == {antialias}


def test_a_draw_depends_on_seed_and_samples_alone():
    settings = BranchSettings()
    assert draws(settings)[:50] == draws(settings)[:50]
    assert draws(settings)[:50] != draws(settings, seed=1)[:50]


def test_scales_without_exact_size_are_left_out_or_refused():
    found = {draw.transform for draw in draws(BranchSettings(0.0, 1.0), size=8)}
    assert found == {Scale.uniform(Fraction(n, 8)) for n in range(2, 8)}
    with pytest.raises(ValueError, match="scale_numerators"):
        draw_branch(BranchSettings(1.0, 0.0), 7, 7, seed=0, samples_seen=0)


def test_impossible_probabilities_are_refused():
    with pytest.raises(ValueError, match="at most 1"):
        BranchSettings(equivariant=0.8, downscaled=0.3)


def test_scales_that_enlarge_and_transforms_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match="got 33/32, expected at most 1"):
        BranchSettings(scale_numerators=(16, 33))
    with pytest.raises(ValueError, match="leave every image unchanged"):
        BranchSettings(scale_numerators=(32,), quarter_turns=(0, 4))
    assert BranchSettings(downscaled=0.0, scale_numerators=(), quarter_turns=(), flips=True).flips
    for numerators in ((), (32,)):
        with pytest.raises(ValueError, match="no scale below 1"):
            BranchSettings(downscaled=0.125, scale_numerators=numerators)


def test_patches_cover_the_grid_and_stay_inside():
    boxes = [draw_patch(16, 12, 8, seed=0, samples_seen=step) for step in range(500)]
    assert {box.top for box in boxes} == set(range(9))
    assert {box.left for box in boxes} == set(range(5))
    with pytest.raises(ValueError, match="expected 1…12"):
        draw_patch(16, 12, 13, seed=0, samples_seen=0)


class PoolingAutoencoder:
    """Encodes by mean pooling with log-variance −2, decodes by repeating pixels."""

    factor = 2

    def posterior(self, image):
        mean = F.avg_pool2d(image, self.factor)
        return Posterior(mean, torch.full_like(mean, -2.0))

    def decode(self, latent):
        return F.interpolate(latent, scale_factor=self.factor, mode="nearest")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    return image, torch.randn(2, 3, 8, 8, generator=generator)


def test_each_branch_has_its_decoder_input_and_target(batch):
    image, noise = batch
    autoencoder, tau = PoolingAutoencoder(), Sequential((Scale.uniform(Fraction(1, 2)), QuarterTurn(1)))
    std = torch.exp(torch.tensor(-1.0))
    latent = F.avg_pool2d(image, 2) + std * noise
    small = F.avg_pool2d(image, 2)  # bilinear halving

    plain = reconstruct(autoencoder, image, Draw(Branch.PLAIN), noise)
    assert torch.equal(plain.target, image)
    torch.testing.assert_close(plain.output, autoencoder.decode(latent))

    moved = reconstruct(autoencoder, image, Draw(Branch.EQUIVARIANT, tau), noise)
    torch.testing.assert_close(moved.target, torch.rot90(small, 1, (-2, -1)))
    torch.testing.assert_close(moved.output, autoencoder.decode(torch.rot90(F.avg_pool2d(latent, 2), 1, (-2, -1))))
    torch.testing.assert_close(moved.posterior.mean, F.avg_pool2d(image, 2))

    scaled = reconstruct(autoencoder, image, Draw(Branch.DOWNSCALED, Scale.uniform(Fraction(1, 2))), noise)
    torch.testing.assert_close(scaled.target, small)
    torch.testing.assert_close(scaled.output, autoencoder.decode(F.avg_pool2d(small, 2) + std * noise[..., :4, :4]))
