"""Solvers against a Gaussian whose velocity field and flow are known in closed form.

If the data are N(m, s²), then x_t ~ N((1−t)m, t² + (1−t)²s²), the velocity is E[ε − x | x_t], linear in x_t, and the
flow carries x_1 to m + s·x_1.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from hdm_lightning.diffusion import sampling

MEAN, STD = 0.8, 0.6


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    score_like = (x - (1 - t) * MEAN) / (t**2 + (1 - t) ** 2 * STD**2)
    return t * score_like - (MEAN + (1 - t) * STD**2 * score_like)


def start() -> Tensor:
    return torch.randn(100, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def largest_error(solver: sampling.Solver, grid: Tensor) -> float:
    return float((solver(gaussian_velocity, start(), grid) - (MEAN + STD * start())).abs().max())


@pytest.mark.parametrize("shift", [1.0, 2.5])
@pytest.mark.parametrize(("name", "order"), [("euler", 1.0), ("heun", 2.0), ("ab2", 2.0), ("ab3", 3.0)])
def test_order_of_convergence(name: str, order: float, shift: float) -> None:
    errors = [largest_error(sampling.SOLVERS[name], sampling.shifted_grid(steps, shift)) for steps in (256, 512, 1024)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(value - order) < 0.12 for value in measured), measured


def test_every_solver_gives_the_gaussian_at_few_steps() -> None:
    errors = {name: largest_error(solver, sampling.shifted_grid(32, 1.0)) for name, solver in sampling.SOLVERS.items()}
    assert errors["euler"] < 0.1
    assert max(errors["heun"], errors["ab2"]) < 3e-3
    assert errors["ab3"] < 3e-4


def test_a_constant_velocity_is_integrated_exactly() -> None:
    grid = sampling.shifted_grid(7, 3.0, start=0.7)
    for solver in sampling.SOLVERS.values():
        end = solver(lambda x, t: torch.full_like(x, 2.0), start(), grid)
        torch.testing.assert_close(end, start() - 2.0 * 0.7)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 10), ("heun", 19), ("ab2", 10), ("ab3", 11)])
def test_number_of_evaluations_and_steps(name: str, evaluations: int) -> None:
    calls: list[float] = []
    states: list[Tensor] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return -x

    def on_step(done: int, x: Tensor) -> Tensor:
        states.append(x)
        assert len(states) == done
        return x

    end = sampling.SOLVERS[name](velocity, start(), sampling.shifted_grid(10, 1.0), on_step)
    assert len(calls) == evaluations
    assert min(calls) > 0.0
    assert len(states) == 10
    assert torch.equal(states[-1], end)


@pytest.mark.parametrize("name", sampling.SOLVERS)
def test_a_step_goes_on_from_what_is_put_in_place_of_the_state(name: str) -> None:
    """Along dx/dt = 0 nothing else moves the state."""
    end = sampling.SOLVERS[name](lambda x, t: 0 * x, start(), sampling.shifted_grid(4, 1.0), lambda done, x: x + done)
    torch.testing.assert_close(end, start() + 10)


def test_a_low_precision_velocity_does_not_lower_the_state() -> None:
    end = sampling.euler(lambda x, t: x.bfloat16(), start().float(), sampling.shifted_grid(3, 1.0))
    assert end.dtype == torch.float32


def test_grids() -> None:
    assert sampling.shifted_grid(4, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]
    shifted = sampling.shifted_grid(4, 3.0)
    torch.testing.assert_close(shifted, torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64))
    assert float(sampling.shifted_grid(8, 0.2)[0]) == 1.0  # not a rounding above it, where no guide acts
    late = sampling.shifted_grid(6, 3.0, start=0.75)
    assert float(late[0]) == pytest.approx(0.75)
    assert float(late[3]) == pytest.approx(0.5)  # the middle of [0, 0.5], which the shift maps to [0, 0.75]


def test_bad_grids_are_named() -> None:
    with pytest.raises(ValueError, match="steps: got 0"):
        sampling.shifted_grid(0, 1.0)
    with pytest.raises(ValueError, match="shift: got -1"):
        sampling.shifted_grid(4, -1.0)
    with pytest.raises(ValueError, match="start: got 0"):
        sampling.shifted_grid(4, 1.0, start=0.0)
    with pytest.raises(ValueError, match="decreasing"):
        sampling.euler(gaussian_velocity, start(), torch.tensor([0.0, 0.5, 1.0]))
