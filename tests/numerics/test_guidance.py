"""Guidance: its formula, its interval, and that what does nothing costs nothing."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from hdm_lightning.diffusion import sampling
from hdm_lightning.diffusion.guidance import Guide, Guided, extrapolate


def constant(value: float, calls: list[float]) -> sampling.Velocity:
    def velocity(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return torch.full_like(x, value)

    return velocity


def unit_gaussian(mean: float) -> sampling.Velocity:
    def velocity(x: Tensor, t: float) -> Tensor:
        residual = (x - (1 - t) * mean) / (t**2 + (1 - t) ** 2)
        return t * residual - mean - (1 - t) * residual

    return velocity


def test_extrapolation() -> None:
    weak, strong = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert extrapolate(weak, strong, 0.0).tolist() == weak.tolist()
    assert extrapolate(weak, strong, 1.0).tolist() == strong.tolist()
    assert extrapolate(weak, strong, 3.0).tolist() == [7.0, -10.0]


def test_one_guide_is_classifier_free_guidance() -> None:
    velocity = Guided(constant(5.0, []), (Guide(constant(2.0, []), scale=3.0),))
    assert velocity(torch.zeros(1), 0.5).item() == 2.0 + 3.0 * (5.0 - 2.0)


def test_two_guides_add_their_pushes() -> None:
    guides = (Guide(constant(2.0, []), scale=3.0), Guide(constant(4.0, []), scale=1.5))
    velocity = Guided(constant(5.0, []), guides)
    assert velocity(torch.zeros(1), 0.5).item() == 5.0 + 2.0 * (5.0 - 2.0) + 0.5 * (5.0 - 4.0)


def test_scale_one_and_times_outside_the_interval_cost_nothing() -> None:
    idle, limited = [], []  # type: list[float], list[float]
    guides = (Guide(constant(2.0, idle), 1.0), Guide(constant(2.0, limited), 4.0, interval=(0.25, 0.75)))
    seen = []
    velocity = Guided(constant(5.0, seen), guides)
    end = sampling.euler(velocity, torch.zeros(1, dtype=torch.float64), sampling.shifted_grid(8, 1.0))
    assert idle == []
    assert limited == [0.75, 0.625, 0.5, 0.375, 0.25]
    assert len(seen) == 8
    assert end.item() == pytest.approx(-(8 * 5.0 + 5 * 3 * 3.0) / 8)


def test_guidance_of_a_gaussian_has_the_closed_form() -> None:
    """Unit-variance Gaussians of means a and b: guided by s, the flow ends at x_1 + b + s(a − b)."""
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity = Guided(unit_gaussian(0.5), (Guide(unit_gaussian(-1.0), scale=2.5),))
    end = sampling.heun(velocity, x, sampling.shifted_grid(400, 1.0))
    torch.testing.assert_close(end, x - 1.0 + 2.5 * 1.5, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", list(sampling.SOLVERS))
@pytest.mark.parametrize("interval", [(0.55, 1.0), (0.0, 0.45), (0.25, 0.75)])
def test_guidance_ends_and_begins_with_a_step(solver: str, interval: tuple[float, float]) -> None:
    """Constant velocities are integrated exactly, each step under the guides that act at its beginning."""
    velocity = Guided(constant(5.0, []), (Guide(constant(2.0, []), 4.0, interval),))
    end = sampling.SOLVERS[solver](velocity, torch.zeros(1, dtype=torch.float64), sampling.shifted_grid(10, 1.0))
    steps = sum(interval[0] <= number / 10 <= interval[1] for number in range(1, 11))
    assert end.item() == pytest.approx(-(5.0 + 0.1 * steps * 3 * 3.0))


@pytest.mark.parametrize(("name", "order"), [("euler", 1.0), ("heun", 2.0), ("ab2", 2.0), ("ab3", 3.0)])
@pytest.mark.parametrize("acts_first", [True, False])
def test_solvers_keep_their_order_across_an_edge_of_the_interval(name: str, order: float, acts_first: bool) -> None:
    """Unit-variance Gaussians: (x_t − (1−t)m)/√(t² + (1−t)²) is constant, m the mean in force, which changes at 1/2."""
    edge = 0.5001  # all of these grids have a time at 1/2, and none between
    interval = (edge, 1.0) if acts_first else (0.0, edge)
    velocity = Guided(unit_gaussian(0.5), (Guide(unit_gaussian(-1.0), 2.5, interval),))
    strong, pushed = 0.5, -1.0 + 2.5 * 1.5
    first, last = (pushed, strong) if acts_first else (strong, pushed)
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = x + last + 0.5 * (first - last) / 0.5**0.5
    errors = [
        float((sampling.SOLVERS[name](velocity, x, sampling.shifted_grid(steps, 1.0)) - exact).abs().max())
        for steps in (256, 512, 1024)
    ]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(value - order) < 0.15 for value in measured), (measured, errors)


def test_bad_interval_is_named() -> None:
    with pytest.raises(ValueError, match="interval"):
        Guide(constant(0.0, []), 2.0, interval=(0.8, 0.2))
