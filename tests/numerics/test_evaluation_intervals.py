"""Bootstrap intervals hold the true value as often as they say, on simulated data whose truth is known."""

import numpy as np
import pytest
import scipy.stats
import torch

from hdm_lightning.metrics.bootstrap import CENTRED, PERCENTILE, WILSON, Bootstrap
from hdm_lightning.metrics.distances import frechet_distance, frechet_estimate, kernel_distance_estimate, moments
from hdm_lightning.metrics.neighbours import neighbour_estimates, neighbour_statistics


def covered(estimates, truth):
    return float(np.mean([one.low <= truth <= one.high for one in estimates]))


def test_intervals_of_means_and_medians_cover_at_the_stated_rate():
    random = np.random.default_rng(0)
    samples = random.exponential(size=(300, 50))
    for confidence in (0.95, 0.8):
        bootstrap = Bootstrap(resamples=300, confidence=confidence)
        assert covered(map(bootstrap.mean, samples), 1.0) == pytest.approx(confidence, abs=0.05)
        assert covered(map(bootstrap.median, samples), np.log(2)) == pytest.approx(confidence, abs=0.05)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_samples():
    values = np.random.default_rng(1).normal(3, 2, size=1500)
    found = Bootstrap(resamples=2000).mean(values)
    reach = 1.96 * values.std() / np.sqrt(1500)
    assert found.value == values.mean()
    assert (found.samples, found.method, found.resamples) == (1500, PERCENTILE, 2000)
    assert found.low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.1 * reach)


@pytest.mark.parametrize(("samples", "share"), [(32, 0.90), (64, 0.95), (128, 0.97), (48, 0.98)])
def test_intervals_of_shares_near_one_cover_as_they_say(samples, share):
    """By the binomial itself, no simulation; quantiles of resamples hold the true share in 87% of these cases."""
    found = [Bootstrap().share([True] * right + [False] * (samples - right)) for right in range(samples + 1)]
    chances = scipy.stats.binom.pmf(np.arange(samples + 1), samples, share)
    assert sum(p for p, one in zip(chances, found, strict=True) if one.low <= share <= one.high) > 0.925
    theirs = scipy.stats.binomtest(samples - 3, samples).proportion_ci(method="wilson")
    assert (found[-4].low, found[-4].high) == pytest.approx((theirs.low, theirs.high))
    assert (found[-1].low, found[-1].high, found[-1].method) == (
        pytest.approx(samples / (samples + 1.96**2), rel=1e-3),
        1.0,
        WILSON,
    )


def test_shares_of_sets_without_spread_take_the_exact_bound():
    nowhere = Bootstrap(resamples=5).sets(lambda one, other: 0.0, 20, 30, bounds=(0.0, 1.0))
    assert (nowhere.low, nowhere.method) == (0.0, CENTRED)
    assert (1 - nowhere.high) ** 20 == pytest.approx(0.025)  # this high a share still gives no hit in 2.5% of the cases
    distance = Bootstrap(resamples=5).sets(lambda one, other: 0.0, 20, 30)  # no share: nothing is known of its spread
    assert (distance.low, distance.high) == (0.0, 0.0)


def pair(random, samples, width, shift=0.2):
    scale = np.linspace(1, 0.5, width)
    sets = random.normal(size=(samples, width)), random.normal(size=(samples, width)) * scale + shift
    return tuple(torch.from_numpy(one) for one in sets)


def test_intervals_of_frechet_distances_cover_their_expectation_where_plain_quantiles_do_not():
    random, samples, width = np.random.default_rng(2), 40, 6
    truth = np.mean([frechet_distance(*map(moments, pair(random, samples, width))) for _ in range(600)])
    bootstrap = Bootstrap(resamples=60)
    found = [frechet_estimate(*pair(random, samples, width), bootstrap) for _ in range(100)]
    assert 0.9 <= covered(found, truth) <= 1.0
    assert found[0].method == CENTRED
    biased = np.mean([moments_of_resamples(*pair(random, samples, width), bootstrap) > truth for _ in range(40)])
    assert biased > 0.9


def moments_of_resamples(first, second, bootstrap):
    """Mean distance of the resamples themselves, which is what plain quantiles lie about."""
    rows = zip(bootstrap.rows(len(first), 1)[:20], bootstrap.rows(len(second), 2)[:20], strict=True)
    return np.mean([frechet_distance(moments(first[one]), moments(second[other])) for one, other in rows])


def test_intervals_of_reconstructions_know_that_both_sets_are_of_the_same_pictures():
    random, samples, width = np.random.default_rng(6), 40, 6

    def made():
        pictures = random.normal(size=(samples, width))
        noise = 0.3 * random.normal(size=(samples, width))
        return torch.from_numpy(pictures), torch.from_numpy(0.9 * pictures + noise + 0.1)

    truth = np.mean([frechet_distance(*map(moments, made())) for _ in range(600)])
    sets, bootstrap = [made() for _ in range(100)], Bootstrap(resamples=60)
    paired = [frechet_estimate(*pair, bootstrap, paired=True) for pair in sets]
    apart = [frechet_estimate(*pair, bootstrap) for pair in sets[:20]]
    assert 0.85 <= covered(paired, truth) <= 1.0
    widths = [np.mean([one.high - one.low for one in found]) for found in (paired, apart)]
    assert widths[0] < 0.7 * widths[1]
    with pytest.raises(ValueError, match="second: got 30 samples, expected 40, one for each"):
        bootstrap.sets(lambda one, other: 0.0, 40, 30, paired=True)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_intervals_of_kernel_distances_cover_the_true_distance(shift):
    random = np.random.default_rng(3)
    large = [kernel_distance_estimate(*pair(random, 800, 6, shift), Bootstrap(resamples=2)).value for _ in range(6)]
    found = [kernel_distance_estimate(*pair(random, 80, 6, shift), Bootstrap(resamples=200)) for _ in range(150)]
    assert 0.9 <= covered(found, np.mean(large)) <= 1.0


def test_intervals_of_neighbour_measures_cover_their_expectation():
    random, samples, width = np.random.default_rng(4), 60, 4
    bootstrap = Bootstrap(resamples=80)

    def value(first, second):
        return neighbour_statistics(torch.cdist(first, first), torch.cdist(second, second), torch.cdist(first, second))

    truth = torch.stack([value(*pair(random, samples, width)) for _ in range(400)]).mean(0)
    found = [neighbour_estimates(*pair(random, samples, width), bootstrap) for _ in range(80)]
    for column, name in enumerate(("precision", "recall", "density", "coverage")):
        assert 0.85 <= covered([one[name] for one in found], float(truth[column])) <= 1.0, name


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="resamples: got 1"):
        Bootstrap(resamples=1)
    with pytest.raises(ValueError, match="confidence: got 1"):
        Bootstrap(confidence=1.0)
    with pytest.raises(ValueError, match="values: got shape"):
        Bootstrap().mean([])
