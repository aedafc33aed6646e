"""The law, the best rates and the plan of experiments/scales, on losses whose truth is known."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.scales import analyze, law, plan

SIZES, LENGTHS = np.array([2e5, 4e5, 6e5, 1.3e6, 2.3e6]), np.array([3200.0, 6400.0, 12800.0])
GRID = np.array([(size, length) for size in SIZES for length in LENGTHS for _ in range(3)])


def loss_of(size, samples, *, floor=0.12, a=0.05, b=0.1, alpha=0.6, beta=0.5):
    return floor + a * (size / 1e6) ** -alpha + b * (samples / 1e4) ** -beta


def test_a_law_without_noise_is_found_and_predicts_what_it_has_not_seen() -> None:
    size, samples = GRID.T
    found = law.fit(size, samples, loss_of(size, samples))
    assert found.alpha == pytest.approx(0.6, rel=0.03)
    assert found.beta == pytest.approx(0.5, rel=0.03)
    assert found.floor == pytest.approx(0.12, abs=0.004)
    assert found(5e6, 25_600) == pytest.approx(loss_of(5e6, 25_600), rel=1e-3)


def test_terms_are_never_negative() -> None:
    size, samples = GRID.T
    found = law.fit(size, samples, 0.3 - 0.02 * np.log(size / 1e6))  # no floor, and nothing by samples
    assert min(found.floor, found.of_size, found.of_samples) >= 0
    assert found(1e6, 6400) == pytest.approx(0.3, rel=0.02)


def test_a_law_needs_three_sizes_and_three_lengths() -> None:
    size, samples = GRID[GRID[:, 1] > 4000].T
    with pytest.raises(ValueError, match="samples: got 2"):
        law.fit(size, samples, loss_of(size, samples))


def test_intervals_of_predictions_hold_the_truth() -> None:
    """Of 30 studies with 2% of noise a further training lies within 95% intervals in most; exponents as well."""
    random, size, samples = np.random.default_rng(3), *GRID.T
    inside = []
    for number in range(30):
        loss = loss_of(size, samples) * (1 + 0.02 * random.standard_normal(len(size)))
        found, others = law.fit(size, samples, loss), law.resampled(size, samples, loss, count=20, seed=number)
        told = law.predicted(found, others, 4e6, 6400.0, 0.02)
        one_more = loss_of(4e6, 6400.0) * (1 + 0.02 * random.standard_normal())
        inside.append(told.low <= one_more <= told.high)
    assert np.mean(inside) >= 0.83


def test_the_best_rate_is_the_vertex_and_stays_within_the_rates() -> None:
    rates = np.tile(plan.RATES, 2)
    seeds = np.repeat([0, 1], len(plan.RATES))
    loss = 0.3 + 0.05 * (np.log(rates) - np.log(0.2)) ** 2
    found = law.best_rate_interval(rates, loss, seeds)
    assert found.value == pytest.approx(0.2, rel=1e-6)
    assert found.low == pytest.approx(0.2, rel=1e-6)
    falling = law.best_rate(rates, -np.log(rates))
    assert falling == pytest.approx(max(plan.RATES))
    assert not found.at_edge
    assert law.best_rate_interval(rates, -np.log(rates), seeds).at_edge
    noisy = loss + 0.01 * np.random.default_rng(0).standard_normal(len(loss))
    wide = law.best_rate_interval(rates, noisy, seeds)
    assert wide.low < 0.2 < wide.high


def test_no_training_runs_twice_and_held_out_points_are_never_fitted() -> None:
    every, once = plan.trainings(), plan.jobs()
    assert len({each.name for each in once}) == len(once)
    assert {each.name for each in every} == {each.name for each in once}
    fitted = {(each.width, each.samples) for each in every if each.kind == "law"}
    held_out = {(each.width, each.samples) for each in every if each.kind == "held out"}
    assert len(fitted) == 15
    assert not fitted & held_out
    assert {each.width % plan.HEAD_DIM for each in once} == {0}


def test_the_page_has_the_numbers_of_the_recorded_results() -> None:
    folder = Path(analyze.__file__).parent
    found = analyze.analyze(analyze.read(folder / "results"))
    assert analyze.tables(found) in (folder / "README.md").read_text(encoding="utf-8")
