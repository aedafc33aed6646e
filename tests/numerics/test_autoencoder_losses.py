"""Loss terms against closed forms and torch's own."""

from typing import get_args

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from hdm_lightning.autoencoding import losses


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 8, 8, generator=generator), torch.rand(3, 3, 8, 8, generator=generator)


def test_pixel_losses_are_means_per_sample(pair):
    output, target = pair
    difference = output - target
    torch.testing.assert_close(losses.pixel_loss(output, target, "l1"), difference.abs().mean((1, 2, 3)))
    torch.testing.assert_close(losses.pixel_loss(output, target, "l2"), difference.pow(2).mean((1, 2, 3)))
    size = difference.abs()
    huber = torch.where(size < 0.1, size.pow(2) / 0.2, size - 0.05)
    torch.testing.assert_close(losses.pixel_loss(output, target, "huber"), huber.mean((1, 2, 3)))
    with pytest.raises(ValueError, match="l1, l2, huber"):
        losses.pixel_loss(output, target, "l3")


@pytest.mark.parametrize("kind", get_args(losses.PixelLoss))
def test_no_term_depends_on_the_resolution(pair, kind):
    output, target = pair
    larger = [torch.nn.functional.interpolate(each, scale_factor=3) for each in (output, target)]
    torch.testing.assert_close(losses.pixel_loss(*larger, kind), losses.pixel_loss(output, target, kind))
    torch.testing.assert_close(losses.kl_divergence(*larger), losses.kl_divergence(output, target))
    torch.testing.assert_close(losses.discriminator_hinge(*larger), losses.discriminator_hinge(output, target))
    torch.testing.assert_close(losses.generator_adversarial(larger[0]), losses.generator_adversarial(output))


def test_kl_is_that_of_the_distributions():
    mean, log_variance = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).mean((1, 2, 3))
    torch.testing.assert_close(losses.kl_divergence(mean, log_variance), expected)


def test_hinge_of_known_logits():
    real, fake = torch.tensor([[[[0.5, 2.0]]]]), torch.tensor([[[[-3.0, 0.0]]]])
    assert losses.discriminator_hinge(real, fake).tolist() == [0.5 * (0.25 + 0.5)]
    assert losses.generator_adversarial(fake).tolist() == [1.5]


def test_adaptive_weight_is_the_clamped_ratio_without_gradient():
    first, second = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 2.5])
    weight = losses.adaptive_weight(first, second)
    assert weight.item() == pytest.approx(5.0 / (2.5 + 1e-4))
    assert not weight.requires_grad
    assert losses.adaptive_weight(first, torch.zeros(2)).item() == 1e4
    assert losses.adaptive_weight(first, torch.zeros(2), 7.0).item() == 7.0


def test_holes_add_nothing_and_do_not_change_the_divisor():
    per_sample = torch.tensor([1.0, 100.0, 5.0, 6.0])
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert losses.batch_mean(per_sample, weight).item() == 12 / 4
    halves = [losses.batch_mean(per_sample[part], weight[part]) for part in (slice(0, 2), slice(2, 4))]
    assert torch.stack(halves).mean().item() == 12 / 4
