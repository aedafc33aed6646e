"""Distances of reconstructions during training, on features that are a picture's mean colour."""

import numpy as np
import pytest
import scipy.linalg
import torch

from hdm_lightning.metrics.features import FeatureNetwork, Preprocessing
from hdm_lightning.training.callbacks.autoencoder_report import ReconstructionDistances

COLOURS = FeatureNetwork("colours", "none", 3, Preprocessing(None), lambda image: image.float().mean((2, 3)) / 255)


def flat(colours):
    """Pictures (N,3,4,4) in [-1, 1] of colours (N,3) in [0, 1]."""
    return (2 * colours - 1)[:, :, None, None].expand(-1, -1, 4, 4)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (9, 3), generator=generator) / 255
    return real, (0.5 * real * 255).round() / 255


def test_both_distances_are_those_of_their_formulas(pairs):
    real, decoded = pairs
    distances = ReconstructionDistances(COLOURS)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for part in order.split(4):
        weight = torch.cat([torch.ones(len(part)), torch.zeros(1)])  # the last is a hole
        index, images, outputs = (torch.cat([each[part], each[:1]]) for each in (torch.arange(9), real, decoded))
        distances.update(flat(images), flat(outputs), index, weight)
    found = distances.report()

    x, y = real[4:].double(), decoded[:4].double()
    kernel = [(one @ other.T / 3 + 1) ** 3 for one, other in ((x, x), (y, y), (x, y))]
    within = [(each.sum() - each.trace()) / (len(each) * (len(each) - 1)) for each in kernel[:2]]
    expected = float(within[0] + within[1] - 2 * kernel[2].mean())
    assert found["reconstruction/kernel_colours"] == pytest.approx(expected, rel=1e-5)

    means = [each.double().mean(0).numpy() for each in (real, decoded)]
    covariances = [np.cov(each.double().numpy().T) for each in (real, decoded)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert found["reconstruction/rfrechet_colours"] == pytest.approx(expected, rel=1e-5)


def test_few_pictures_have_the_distances_that_they_allow(pairs):
    real, decoded = pairs
    for count, names in (
        (0, set()),
        (3, set()),
        (4, {"reconstruction/kernel_colours", "reconstruction/rfrechet_colours"}),
    ):
        distances = ReconstructionDistances(COLOURS)
        distances.update(flat(real[:count]), flat(decoded[:count]), torch.arange(count), torch.ones(count))
        assert set(distances.report()) == names
