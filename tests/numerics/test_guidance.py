"""Guidance: its formula, its interval, and that what does nothing costs nothing."""

import pytest
import torch
from torch import Tensor

from hdm_lightning.diffusion import sampling, times
from hdm_lightning.diffusion.guidance import Guide, extrapolate, guided


def constant(value: float, calls: list[float]) -> sampling.Velocity:
    def velocity(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return torch.full_like(x, value)

    return velocity


def test_extrapolation() -> None:
    weak, strong = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert extrapolate(weak, strong, 0.0).tolist() == weak.tolist()
    assert extrapolate(weak, strong, 1.0).tolist() == strong.tolist()
    assert extrapolate(weak, strong, 3.0).tolist() == [7.0, -10.0]


def test_one_guide_is_classifier_free_guidance() -> None:
    velocity = guided(constant(5.0, []), [Guide(constant(2.0, []), scale=3.0)])
    assert velocity(torch.zeros(1), 0.5).item() == 2.0 + 3.0 * (5.0 - 2.0)


def test_two_guides_add_their_pushes() -> None:
    guides = [Guide(constant(2.0, []), scale=3.0), Guide(constant(4.0, []), scale=1.5)]
    velocity = guided(constant(5.0, []), guides)
    assert velocity(torch.zeros(1), 0.5).item() == 5.0 + 2.0 * (5.0 - 2.0) + 0.5 * (5.0 - 4.0)


def test_scale_one_and_times_outside_the_interval_cost_nothing() -> None:
    idle, limited = [], []  # type: list[float], list[float]
    guides = [Guide(constant(2.0, idle), 1.0), Guide(constant(2.0, limited), 4.0, interval=(0.25, 0.75))]
    seen = []
    velocity = guided(constant(5.0, seen), guides)
    end = sampling.euler(velocity, torch.zeros(1, dtype=torch.float64), times.uniform_grid(8))
    assert idle == []
    assert limited == [0.75, 0.625, 0.5, 0.375, 0.25]
    assert len(seen) == 8
    assert end.item() == pytest.approx(-(8 * 5.0 + 5 * 3 * 3.0) / 8)


def test_guidance_of_a_gaussian_has_the_closed_form() -> None:
    """Unit-variance Gaussians of means a and b: guided by s, the flow ends at x_1 + b + s(a − b)."""

    def unit_gaussian(mean: float) -> sampling.Velocity:
        def velocity(x: Tensor, t: float) -> Tensor:
            residual = (x - (1 - t) * mean) / (t**2 + (1 - t) ** 2)
            return t * residual - mean - (1 - t) * residual

        return velocity

    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity = guided(unit_gaussian(0.5), [Guide(unit_gaussian(-1.0), scale=2.5)])
    end = sampling.heun(velocity, x, times.uniform_grid(400))
    torch.testing.assert_close(end, x - 1.0 + 2.5 * 1.5, rtol=0, atol=1e-4)


def test_bad_interval_is_named() -> None:
    with pytest.raises(ValueError, match="interval"):
        Guide(constant(0.0, []), 2.0, interval=(0.8, 0.2))
