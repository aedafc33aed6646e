"""The PatchGAN discriminator: receptive field, sizes, parameters."""

import pytest
import torch

from hdm_lightning.models.discriminator import NORMS, PatchDiscriminator, smallest_side


def test_published_size_and_parameters():
    network = PatchDiscriminator(64, 3, "batch")
    convolutions = [(3, 64, 1), (64, 128, 0), (128, 256, 0), (256, 512, 0), (512, 1, 1)]
    expected = sum(16 * i * o + bias * o for i, o, bias in convolutions) + 2 * (128 + 256 + 512)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert network.eval()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_a_patch_sees_70_pixels():
    network = PatchDiscriminator(4, 3, "none").double()
    image = torch.randn(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    network(image)[0, 0, 15, 15].backward()
    rows = torch.nonzero(image.grad.abs().sum((0, 1, 3))).flatten()
    assert (rows.max() - rows.min() + 1).item() == 70


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_side_gives_one_patch_and_a_smaller_one_none(norm, layers):
    network = PatchDiscriminator(6, layers, norm).eval()
    side = smallest_side(layers)
    assert network(torch.zeros(2, 3, side, side)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(2, 3, side - 2**layers, side - 2**layers))


def test_group_norm_judges_a_picture_alone_and_batch_norm_does_not():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for norm, same in (("group", True), ("none", True), ("batch", False)):
        network = PatchDiscriminator(8, 2, norm)
        alone = network(images[:1] if norm != "batch" else images[:2])[:1]
        assert torch.allclose(network(images)[:1], alone, atol=1e-5) is same


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="batch, group, none"):
        PatchDiscriminator(norm="layer")
    with pytest.raises(ValueError, match="at least 1"):
        PatchDiscriminator(layers=0)
