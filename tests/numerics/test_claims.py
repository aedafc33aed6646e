"""Shares over combinations, paired models, several trainings: against scipy, closed forms, and simulated truth."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from hdm_lightning.datasets.shapes import scene_prompts
from hdm_lightning.metrics.comparisons import (
    holm,
    images_to_tell,
    mcnemar,
    over_trainings,
    paired_difference,
    smallest_difference,
)
from hdm_lightning.metrics.proportions import clustered_interval, difference_interval, share_interval
from hdm_lightning.metrics.quantiles import incomplete_beta, t_quantile, t_tail


@pytest.mark.parametrize("freedom", [1, 2, 4, 15, 127])
def test_students_t_is_that_of_scipy(freedom):
    for share in (0.6, 0.95, 0.975, 0.9995, 0.025):
        assert t_quantile(share, freedom) == pytest.approx(scipy.stats.t.ppf(share, freedom), rel=1e-9)
    for value in (0.0, 0.3, 2.1, -7.0):
        assert t_tail(value, freedom) == pytest.approx(2 * scipy.stats.t.sf(abs(value), freedom), rel=1e-9)
    for x in (0.01, 0.4, 0.99):
        assert incomplete_beta(x, 2.5, freedom) == pytest.approx(scipy.special.betainc(2.5, freedom, x), rel=1e-9)


def beta_binomial(random, units, each, mean, alike):
    """Right answers of each unit, whose true shares differ: `alike` is the correlation of two images of one unit."""
    strength = 1 / alike - 1
    shares = random.beta(mean * strength, (1 - mean) * strength, units)
    return random.binomial(1, np.repeat(shares, each))


@pytest.mark.parametrize(("mean", "alike", "least"), [(0.9, 0.2, 0.93), (0.7, 0.3, 0.93), (0.9, 0.57, 0.87)])
def test_intervals_over_combinations_cover_where_those_over_images_do_not(mean, alike, least):
    random, units = np.random.default_rng(0), [[str(unit)] for unit in np.repeat(np.arange(16), 8)]
    over_units = over_images = 0
    for _ in range(800):
        right = beta_binomial(random, 16, 8, mean, alike)
        low, high = clustered_interval(right, np.ones(128), units, 0.95)
        over_units += low <= mean <= high
        low, high = share_interval(right.mean(), 128, 0.95)
        over_images += low <= mean <= high
    assert over_units / 800 > least
    assert over_images / 800 < 0.8


def test_images_of_two_combinations_depend_on_those_of_either():
    """The unit's own effect is in every prompt that names it: simulated, with the truth from a million draws."""
    random, count, images = np.random.default_rng(1), 16, 64
    truth = scipy.special.expit(1 + random.normal(size=(1_000_000, 2)).sum(1)).mean()
    covered = blind = 0
    for _ in range(500):
        effect = random.normal(size=count)
        first = np.arange(images) % count
        second = (first + random.integers(1, count, images)) % count
        right = random.binomial(1, scipy.special.expit(1 + effect[first] + effect[second]))
        units = [[str(one), str(other)] for one, other in zip(first, second, strict=True)]
        low, high = clustered_interval(right, np.ones(images), units, 0.95)
        covered += low <= truth <= high
        low, high = share_interval(right.mean(), images, 0.95)
        blind += low <= truth <= high
    assert covered / 500 > 0.88 and blind / 500 < 0.82


def test_the_gap_of_two_shares_is_covered():
    random, covered = np.random.default_rng(2), 0
    for _ in range(1000):
        one, other = random.binomial(64, 0.95) / 64, random.binomial(128, 0.8) / 128
        low, high = difference_interval(one, share_interval(one, 64, 0.95), other, share_interval(other, 128, 0.95))
        covered += low <= 0.15 <= high
    assert 0.93 < covered / 1000 < 0.98


def test_a_paired_difference_is_the_t_test_of_scipy():
    random = np.random.default_rng(3)
    first = random.normal(size=40)
    second = first + random.normal(0.3, 0.5, size=40)
    found, theirs = paired_difference(first, second), scipy.stats.ttest_rel(second, first)
    interval = theirs.confidence_interval()
    assert (found.value, found.p) == pytest.approx((np.mean(second - first), theirs.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.inner == pytest.approx(tuple(theirs.confidence_interval(0.9)))


def test_pairs_that_share_a_combination_are_one():
    """Eight copies of each of twelve differences tell no more than the twelve."""
    random = np.random.default_rng(4)
    difference = random.normal(0.2, 1, size=12)
    units = [[str(unit)] for unit in np.repeat(np.arange(12), 8)]
    repeated = paired_difference(np.zeros(96), np.repeat(difference, 8), units=units)
    once = paired_difference(np.zeros(12), difference)
    assert (repeated.value, repeated.low, repeated.p) == pytest.approx((once.value, once.low, once.p))
    assert repeated.units == 12


def test_images_that_one_model_alone_has_right_are_told_by_the_exact_test():
    first, second = [1] * 50 + [0] * 10 + [1] * 2, [1] * 50 + [1] * 10 + [0] * 2
    expected = scipy.stats.binomtest(2, 12).pvalue
    assert mcnemar(2, 10) == pytest.approx(expected)
    assert paired_difference(first, second).p == pytest.approx(expected)


def named_pairs(prompts):
    """The colours and shapes that each prompt of two objects names."""
    return [[f"{thing['colour']} {thing['shape']}" for thing in prompt.spec["objects"]] for prompt in prompts]


@pytest.mark.parametrize(("alike", "least", "most"), [(0.0, 0.01, 0.065), (1.0, 0.03, 0.13)])
def test_two_equal_models_on_pairs_differ_as_often_as_the_level_says(alike, least, most):
    """`alike`: how much a combination's effect on each model moves the logit of all prompts that name it.

    With no effect the level holds; where a dozen combinations decide nearly all, it is up to twice as often.
    """
    random, units = np.random.default_rng(11), named_pairs(scene_prompts(48, objects=2, split="heldout"))
    number = {name: row for row, name in enumerate(sorted({name for names in units for name in names}))}
    named = np.array([[number[name] for name in names] for names in units])
    shown = missed = 0
    for _ in range(800):
        effects = alike * random.normal(size=(2, len(number)))
        one, other = random.binomial(1, scipy.special.expit(0.5 + effects[:, named].sum(-1)))
        found = paired_difference(one, other, trials=np.ones(48), units=units)
        shown += found.p < 0.05
        missed += not found.low <= 0 <= found.high
        assert found.low < found.value < found.high and found.smallest > 0
    assert least < shown / 800 < most and missed == shown


def test_a_share_that_nothing_changes_is_bounded_by_scipys_exact_interval():
    for count, units in ((4, None), (6, [[str(row // 2)] for row in range(6)])):
        independent = count if units is None else count // 2
        reach = scipy.stats.binomtest(0, independent).proportion_ci(0.95, method="exact").high
        found = paired_difference([1] * count, [1] * count, units=units)
        assert (found.low, found.high, found.smallest) == pytest.approx((-reach, reach, reach))
        assert found.inner == pytest.approx((-reach, reach)) and not found.within(0.05) and found.p == 1
    assert paired_difference([1] * 120, [1] * 120).within(0.05)


@pytest.mark.parametrize("count", [2, 5, 6, 9])
def test_units_that_all_change_are_told_by_the_sign_test(count):
    """And the interval leaves out no change exactly where that test does."""
    units = [[str(row)] for row in range(count)]
    gained = paired_difference([0] * count, [1] * count, units=units)
    lost = paired_difference([1] * count, [0] * count, units=units)
    assert gained.p == lost.p == pytest.approx(scipy.stats.binomtest(count, count).pvalue)
    assert (gained.low > 0) == (gained.p < 0.05) and gained.high == 1
    assert (lost.low, lost.high) == pytest.approx((-gained.high, -gained.low))


def test_numbers_without_a_range_keep_to_their_value_and_to_the_sign_test():
    first = np.array([0.7, 1.9, 3.3, 2.6])
    found = paired_difference(first, first + 0.1)  # each sum is rounded otherwise
    assert (found.low, found.high) == pytest.approx((0.1, 0.1)) and found.p == pytest.approx(2 / 16)


def test_one_image_of_two_combinations_is_one():
    for units in ([["a", "b"]], [["a"], ["a"]], None):
        count = 2 if units == [["a"], ["a"]] else 1
        with pytest.raises(ValueError, match="got 1 independent"):
            paired_difference([0] * count, [1] * count, units=units)


def test_sameness_is_shown_by_narrow_intervals_alone():
    random = np.random.default_rng(5)
    noise = random.normal(size=20)
    narrow, wide = (paired_difference(np.zeros(20), 0.02 + spread * noise) for spread in (0.01, 0.2))
    assert narrow.within(0.05) and not wide.within(0.05)
    assert wide.low < 0 < wide.high  # no difference shown, and no sameness either
    wrong = sum(paired_difference(np.zeros(12), random.normal(0.05, 0.05, 12)).within(0.05) for _ in range(600))
    assert wrong / 600 < 0.08  # at the margin itself, sameness is claimed in 5% of the cases


def test_the_smallest_difference_is_found_in_four_fifths_of_the_cases():
    random = np.random.default_rng(6)
    expected = np.mean([paired_difference(np.zeros(30), random.normal(size=30)).smallest for _ in range(50)])
    found = [paired_difference(np.zeros(30), random.normal(expected, 1, 30)).p < 0.05 for _ in range(800)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_holm_holds_the_family():
    ps = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}
    assert holm(ps) == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.5})
    random = np.random.default_rng(7)
    families = [holm({str(number): p for number, p in enumerate(row)}) for row in random.random((2000, 10))]
    assert np.mean([min(each.values()) < 0.05 for each in families]) < 0.06


def test_a_further_training_falls_where_it_is_said_to():
    random, inside, mean_inside = np.random.default_rng(8), 0, 0
    for _ in range(2000):
        runs = random.normal(3.0, 0.5, size=6)
        found = over_trainings(list(runs[:5]))
        inside += found.next_low <= runs[5] <= found.next_high
        mean_inside += found.low <= 3.0 <= found.high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015) and mean_inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_shares_of_trainings_stay_within_their_range_and_cover():
    random, inside = np.random.default_rng(9), 0
    for _ in range(1500):
        shares = random.binomial(128, scipy.special.expit(random.normal(2.5, 0.8, size=6))) / 128
        found = over_trainings(list(shares[:5]), trials=[128] * 5)
        assert 0 < found.next_low < found.low <= found.high < found.next_high <= 1
        inside += found.next_low <= shares[5] <= found.next_high
    assert 0.93 < inside / 1500 < 0.98
    logits = [np.log(((1 - lost) * 128 + 0.5) / (lost * 128 + 0.5)) for lost in (0, 0, 0, 0, 0, 0, 0, 0.5)]
    skewed = over_trainings([1.0] * 7 + [0.5], trials=[128] * 8)
    interval = scipy.stats.ttest_1samp(logits, 0).confidence_interval()
    assert skewed.logit_centre == pytest.approx(scipy.special.expit(np.mean(logits)))
    assert (skewed.low, skewed.high) == pytest.approx(tuple(scipy.special.expit(interval)))
    assert skewed.mean == 15 / 16 < skewed.low < skewed.logit_centre < skewed.high
    assert over_trainings([1.0, 0.5]).logit_centre is None
    two = over_trainings([48 / 48, 41 / 48], trials=[48, 48])
    assert (two.least, two.most) == (41 / 48, 1.0)
    assert two.next_low < 0.05  # of two trainings nothing follows for a third


@pytest.mark.parametrize("share", [0.5, 0.97, 0.995, 1.0])
@pytest.mark.parametrize("trials", [48, 128])
def test_another_training_of_the_same_share_is_inside(share, trials):
    """Also where all trainings so far had everything right; before, a further one without a mistake was outside."""
    random, inside = np.random.default_rng(11), 0
    for _ in range(1000):
        shares = random.binomial(trials, share, size=6) / trials
        found = over_trainings(list(shares[:5]), trials=[trials] * 5)
        inside += found.next_low <= shares[5] <= found.next_high
    assert inside / 1000 > 0.94
    assert 0.85 < over_trainings([1.0] * 5, trials=[128] * 5).next_low < 1


def test_planned_numbers_find_the_difference_in_four_fifths_of_the_cases():
    assert images_to_tell(0.95, 0.90) == pytest.approx(435, abs=1) and images_to_tell(0.85, 0.80) == pytest.approx(
        906, abs=1
    )
    assert images_to_tell(0.95, 0.90, design_effect=5) == pytest.approx(5 * 435, abs=5)
    count, random = images_to_tell(0.95, 0.90), np.random.default_rng(10)
    one, other = random.binomial(count, 0.95, 2000), random.binomial(count, 0.90, 2000)
    pooled = (one + other) / (2 * count)
    z = (one - other) / count / np.sqrt(2 * pooled * (1 - pooled) / count)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)
    assert smallest_difference(0.95, count) == pytest.approx(0.05, abs=0.001)
    assert smallest_difference(0.5, 2) == float("inf")
