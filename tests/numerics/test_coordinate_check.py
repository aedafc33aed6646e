"""Coordinate check: under the default rule activations keep their scale when the width grows; a constant rate fails."""

import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.coordinate_check.check import CoordinateCheck, width_exponent


def exponents(check: CoordinateCheck, widths: list[int], seed: int = 0) -> dict[str, float]:
    by_width = [check.scales(width, seed) for width in widths]
    return {name: width_exponent(widths, [scales[name][-1] for scales in by_width]) for name in by_width[0]}


def test_the_exponent_of_a_power_law_is_found() -> None:
    assert width_exponent([64, 128, 256], [3 * w**0.5 for w in (64, 128, 256)]) == pytest.approx(0.5)
    assert width_exponent([64, 128, 256], [2.0, 2.0, 2.0]) == pytest.approx(0)


@pytest.mark.parametrize("residual", ["input", "normed"])
def test_activations_after_some_steps_do_not_grow_with_the_width(residual: str) -> None:
    check = CoordinateCheck("mup", 0.5, steps=6, wiring={"residual": residual})
    found = exponents(check, [64, 128, 256])
    assert found.keys() >= {"patch embedding", "modulation", "velocity", "block 0", "block 3"}
    assert max(abs(exponent) for exponent in found.values()) < 0.35, found
    assert abs(statistics.mean(found.values())) < 0.15, found


def test_a_constant_rate_lets_them_grow() -> None:
    found = exponents(CoordinateCheck("constant", 0.5 / 64, wiring={"residual": "input"}), [64, 128, 256])
    assert found["block 3"] > 1, found
    assert found["modulation"] > 0.5, found


def test_training_moves_the_activations_at_every_width() -> None:
    """The check would pass trivially where nothing is learnt."""
    for width in (64, 256):
        scales = CoordinateCheck(steps=6).scales(width, seed=0)
        assert scales["velocity"][0] == 0
        assert scales["velocity"][-1] > 0.3
        assert scales["block 3"][-1] > 1.1 * scales["block 3"][0]


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["input", "normed"])
def test_up_to_width_1024(residual: str) -> None:
    check = CoordinateCheck("mup", 0.5, wiring={"residual": residual})
    found = exponents(check, [64, 256, 1024])
    assert max(abs(exponent) for exponent in found.values()) < 0.25, found
