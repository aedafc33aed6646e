"""Distances of feature sets against closed forms, scipy, torchmetrics and constructed point sets."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from hdm_lightning.metrics.bootstrap import Bootstrap
from hdm_lightning.metrics.comparisons import paired_difference
from hdm_lightning.metrics.distances import (
    diversity_estimates,
    frechet_distance,
    frechet_estimate,
    frechet_floor,
    gaussian_kernel,
    kernel_contributions,
    kernel_distance,
    kernel_distance_estimate,
    kernel_floor,
    mean_pairs,
    moments,
)
from hdm_lightning.metrics.neighbours import euclidean_distances, neighbour_estimates

FEW = Bootstrap(resamples=10)


class FirstPixels(torch.nn.Module):
    """A feature network for torchmetrics: twelve pixels of a uint8 picture."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1)[:, :12].float() / 64


def picture_sets(real=90, generated=70):
    random = torch.Generator().manual_seed(0)
    first = torch.randint(0, 256, (real, 3, 4, 4), generator=random, dtype=torch.uint8)
    second = torch.randint(30, 200, (generated, 3, 4, 4), generator=random, dtype=torch.uint8)
    return first, second


def test_frechet_distance_of_gaussians_with_one_basis_is_the_closed_form():
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    one, other = torch.tensor([4.0, 1.0, 9.0, 0.25, 0.0]).double(), torch.tensor([1.0, 1.0, 4.0, 4.0, 0.0]).double()
    means = torch.zeros(5).double(), torch.tensor([3.0, 0, 0, 4.0, 0]).double()
    covariances = (basis * one) @ basis.T, (basis * other) @ basis.T
    expected = 25 + ((one.sqrt() - other.sqrt()) ** 2).sum()
    got = frechet_distance((means[0], covariances[0]), (means[1], covariances[1]))
    assert got == pytest.approx(float(expected), abs=1e-6)


def test_frechet_distance_agrees_with_scipy_and_torchmetrics():
    first, second = picture_sets()
    network = FirstPixels()
    features = network(first), network(second)
    got = frechet_estimate(*features, FEW)
    (m1, c1), (m2, c2) = ((f.double().numpy().mean(0), np.cov(f.double().numpy().T)) for f in features)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert got.value == pytest.approx(expected, rel=1e-8)
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert got.value == pytest.approx(float(metric.compute()), rel=1e-4)
    assert got.low < got.value < got.high


def test_frechet_distance_says_how_many_samples_it_needs():
    with pytest.raises(ValueError, match="got 12 samples of 12 features, expected at least 13"):
        frechet_estimate(torch.randn(20, 12), torch.randn(12, 12), FEW)
    with pytest.raises(ValueError, match=r"expected \(M, 12\)"):
        frechet_estimate(torch.randn(20, 12), torch.randn(20, 11), FEW)
    mean, covariance = moments(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    assert (mean.tolist(), covariance.tolist()) == ([1, 1], [[2, -2], [-2, 2]])


def test_kernel_distance_agrees_with_torchmetrics_on_all_pairs():
    first, second = picture_sets(70, 70)
    network = FirstPixels()
    got = kernel_distance_estimate(network(first), network(second), FEW)
    metric = KernelInceptionDistance(feature=network, subsets=1, subset_size=70)
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert got.value == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_gaussian_kernel_distance_is_the_closed_form_for_gaussians():
    random = torch.Generator().manual_seed(2)
    width, shift, bandwidth = 3, 1.5, 2.0
    spread = bandwidth**2 + 2  # of the difference of two standard normals seen through the kernel
    same = (bandwidth**2 / spread) ** (width / 2)
    expected = 2 * same * (1 - np.exp(-(shift**2) / (2 * spread)))

    def distance():
        first, second = torch.randn(2, 300, width, generator=random)
        moved = second + torch.tensor([shift, 0, 0])
        kernel = partial(gaussian_kernel, bandwidth=bandwidth)
        return kernel_distance_estimate(first, moved, Bootstrap(resamples=2), kernel=kernel, scale=10.0).value

    found = np.array([distance() for _ in range(60)])
    assert found.mean() == pytest.approx(10 * expected, abs=3 * found.std() / np.sqrt(60))
    assert found.std() / np.sqrt(60) < 0.03 * 10 * expected


def test_blocks_do_not_change_the_kernel_distance(monkeypatch):
    first, second = torch.randn(50, 4), torch.randn(37, 4) + 1
    whole = kernel_distance_estimate(first, second, FEW)
    monkeypatch.setattr("hdm_lightning.metrics.distances._BLOCK_ROWS", 7)
    parts = kernel_distance_estimate(first, second, FEW)
    assert (parts.value, parts.low, parts.high) == pytest.approx((whole.value, whole.low, whole.high), rel=1e-10)


def test_mean_pairs_leaves_out_a_sample_with_itself():
    matrix = torch.tensor([[7.0, 1, 2], [1, 7, 3], [2, 3, 7]])
    value, replicates = mean_pairs(matrix, Bootstrap(resamples=500))
    assert value == 2.0
    finite = replicates[np.isfinite(replicates)]  # a resample of one sample thrice has no pair
    assert finite.min() >= 1
    assert finite.max() <= 3


def test_neighbour_measures_on_constructed_points():
    real = torch.arange(10.0)[:, None]  # ball of k = 2: radius 1 inside, 2 at the ends
    generated = torch.tensor([[4.5], [4.4], [4.6], [50.0]])
    found = neighbour_estimates(real, generated, FEW, neighbours=2)
    assert found["precision"].value == 0.75  # all but the one at 50
    assert found["density"].value == pytest.approx((2 + 2 + 2) / (2 * 4))  # each near one lies in the balls of 4 and 5
    assert found["coverage"].value == 0.2  # balls of 4 and 5
    # Generated balls: 4.5 ± 0.1 and 4.4, 4.6 ± 0.2 hold no integer; that of 50 reaches 4.5.
    assert found["recall"].value == 0.5


def test_neighbour_measures_agree_with_a_second_implementation():
    random = np.random.default_rng(5)
    real, generated, k = random.normal(size=(80, 5)), random.normal(size=(60, 5)) * 1.3 + 0.3, 5
    radius = np.partition(cdist(real, real), k, axis=1)[:, k]
    own = np.partition(cdist(generated, generated), k, axis=1)[:, k]
    across = cdist(real, generated)
    expected = {
        "precision": np.mean([(across[:, j] <= radius).any() for j in range(60)]),
        "recall": np.mean([(across[i] <= own).any() for i in range(80)]),
        "density": np.mean([(across[:, j] <= radius).sum() / k for j in range(60)]),
        "coverage": np.mean([(across[i] <= radius[i]).any() for i in range(80)]),
    }
    found = neighbour_estimates(torch.from_numpy(real), torch.from_numpy(generated), FEW, k)
    assert {name: one.value for name, one in found.items()} == pytest.approx(expected)
    with pytest.raises(ValueError, match="got 5 samples, expected more than the 5 neighbors"):
        neighbour_estimates(torch.from_numpy(real), torch.from_numpy(generated[:5]), FEW, k)


def test_diversity_is_a_share_of_the_real_pictures_distances():
    real = torch.tensor([[0.0], [3.0], [6.0]])  # mean distance 4
    by_prompt = torch.tensor([[[0.0], [1.0]], [[10.0], [13.0]]])  # within 1 and 3, across 10 and 12
    found = diversity_estimates(by_prompt, real, Bootstrap(resamples=50))
    assert found["real"].value == pytest.approx(4)
    assert found["within"].value == pytest.approx(2 / 4)
    assert found["across"].value == pytest.approx(11 / 4)
    with pytest.raises(ValueError, match="S ≥ 2"):
        diversity_estimates(by_prompt[:, :1], real, FEW)


def test_equal_pictures_have_distance_zero_and_leave_diversity_finite():
    random = torch.Generator().manual_seed(0)
    different = torch.rand(31, 1280, generator=random)
    real = torch.cat([different, different])
    matrix = euclidean_distances(real, real)
    assert matrix[torch.arange(31), torch.arange(31) + 31].tolist() == [0.0] * 31
    np.testing.assert_allclose(matrix.double(), cdist(real.double(), real.double()), rtol=1e-5)
    by_prompt = different[:12].reshape(3, 4, -1).clone()
    by_prompt[0] = by_prompt[0, 0]  # one prompt always gives the same picture
    found = diversity_estimates(by_prompt, real, FEW)
    pairs = cdist(real.double(), real.double())
    assert found["real"].value == pytest.approx(pairs.sum() / (62 * 61))
    within = [cdist(one.double(), one.double()).sum() / 12 for one in by_prompt]
    assert found["within"].value == pytest.approx(np.mean(within) / found["real"].value)
    assert all(np.isfinite([one.value, one.low, one.high]).all() for one in found.values())
    with pytest.raises(ValueError, match="all images are equal"):
        diversity_estimates(by_prompt, real[:1].expand(5, -1), FEW)


def test_half_of_a_few_pictures_equal_still_gives_an_interval():
    real = torch.tensor([[0.0], [0.0], [3.0]])  # a third of the resamples of three hold equal pictures only
    found = diversity_estimates(torch.tensor([[[0.0], [1.0]], [[10.0], [13.0]]]), real, Bootstrap(resamples=200))
    assert found["within"].value == pytest.approx(2 / 2)
    assert np.isfinite([found["within"].low, found["within"].high]).all()


def equal_sets(random, samples, width):
    scale = np.linspace(1, 0.3, width)
    return (torch.from_numpy(random.normal(size=(samples, width)) * scale) for _ in range(2))


@pytest.mark.parametrize(("samples", "width"), [(100, 8), (150, 64)])
def test_the_floor_of_a_frechet_distance_is_what_equal_distributions_give(samples, width):
    """Of 150 samples of 64 features the bias is most of what is seen; the floor has to show it, not hide it."""
    random = np.random.default_rng(20)
    truth = [frechet_distance(*map(moments, equal_sets(random, samples, width))) for _ in range(100)]
    floors = [
        frechet_floor(next(equal_sets(random, samples, width)), samples, Bootstrap(resamples=30)) for _ in range(12)
    ]
    assert np.mean([floor.value for floor in floors]) == pytest.approx(np.mean(truth), rel=0.12)
    assert np.mean([floor.low for floor in floors]) < np.mean(truth) < np.mean([floor.high for floor in floors])


def test_the_floor_of_a_kernel_distance_is_nought_with_the_spread_of_equal_sets():
    random = np.random.default_rng(21)
    truth = [kernel_distance(*equal_sets(random, 80, 16)) for _ in range(300)]
    floors = [kernel_floor(next(equal_sets(random, 80, 16)), 80, Bootstrap(resamples=200)) for _ in range(10)]
    spread = np.std(truth)
    assert abs(np.mean([floor.value for floor in floors])) < 0.3 * spread
    inside = [np.mean([(floor.low < one < floor.high) for one in truth]) for floor in floors]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.04)


def of_captions(random, captions, width):
    """Two sets of equal distributions whose images i share what caption i asks for."""
    cause = random.normal(size=(captions, width))
    return (torch.from_numpy(cause + 0.3 * random.normal(size=(captions, width))) for _ in range(2))


def test_images_of_one_caption_do_not_make_the_distance_too_small():
    random = np.random.default_rng(22)
    found = {matched: [] for matched in (True, False)}
    for _ in range(300):
        real, drawn = of_captions(random, 24, 6)
        for matched, values in found.items():
            values.append(kernel_distance_estimate(real, drawn, Bootstrap(resamples=2), matched=matched).value)
    error = {matched: np.std(values) / 300**0.5 for matched, values in found.items()}
    assert abs(np.mean(found[True])) < 3 * error[True]  # the truth is nought
    assert np.mean(found[False]) < -6 * error[False]


def test_contributions_add_up_to_the_distance_and_their_differences_cover_the_truth():
    random = np.random.default_rng(23)
    reference = torch.from_numpy(random.normal(size=(200, 5)))

    def drawn(count):
        cause = random.normal(size=(count, 5))
        return [torch.from_numpy(cause + 0.5 * random.normal(size=(count, 5)) + shift) for shift in (0.1, 0.3)]

    one, other = drawn(60)
    for matched in (False, True):
        added = kernel_contributions(reference[:60], one, matched=matched).mean()
        whole = kernel_distance_estimate(reference[:60], one, Bootstrap(resamples=2), matched=matched).value
        assert float(added) == pytest.approx(whole)
    large = drawn(4000)
    truth = kernel_distance(reference, large[1]) - kernel_distance(reference, large[0])
    covered = 0
    for _ in range(200):
        one, other = (kernel_contributions(reference, each).numpy() for each in drawn(60))
        found = paired_difference(one, other)
        covered += found.low <= truth <= found.high
    assert covered / 200 > 0.9
