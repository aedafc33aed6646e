"""Solvers of the flow ODE dx/dt = v(x, t) along a decreasing time grid, from noise (1) to image (0), and that grid.

Shapes: x and velocities (B, ...); grids (steps + 1,).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

LARGEST_SHIFT = 1e6
"""Largest shift of a time grid; beyond it, all steps but the last are in pure noise."""

Velocity = Callable[[Tensor, float], Tensor]
"""v(x, t): the velocity of a whole batch at one time; t is a float, so branching on it never waits for a device.

A velocity that jumps at some times, as guidance does at the ends of its interval, has a method `piece(t)`: a velocity
that is smooth in time and agrees with it around t. Pieces of two times compare equal if no jump lies between them.
Each step uses only the piece at its start, and no solver extrapolates across a jump.
"""

OnStep = Callable[[int, Tensor], Tensor]
"""Called after each step as (steps done, state); returns the state to continue from."""

Solver = Callable[..., Tensor]
"""(velocity, x, grid, on_step=…) -> x at the grid's last time."""


def shifted_grid(steps: int, shift: float, *, start: float = 1.0) -> Tensor:
    """Return a grid of equal steps to 0 shifted toward noise, t ← shift·t / (1 + (shift − 1)·t) (arXiv 2403.03206,
    equation 23).

    Args:
        steps: number of steps, at least 1.
        shift: above 0, at most `LARGEST_SHIFT`; 1 leaves the grid uniform, above 1 spends more steps near noise.
        start: first time after the shift, in (0, 1]; below 1 for image-to-image.

    Returns:
        `steps` + 1 decreasing times, float64 on the CPU.

    Raises:
        ValueError: an argument is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    if not 0.0 < shift <= LARGEST_SHIFT:
        raise ValueError(f"shift: got {shift}, expected above 0 and at most {LARGEST_SHIFT:g}")
    if not 0.0 < start <= 1.0:
        raise ValueError(f"start: got {start}, expected 0 < start ≤ 1")
    start_before_shift = start / (shift * (1.0 - start) + start)  # this form subtracts no two large numbers
    grid = torch.linspace(start_before_shift, 0.0, steps + 1, dtype=torch.float64)
    shifted = shift * grid / (1.0 + (shift - 1.0) * grid)
    shifted[0] = start  # rounding could put it above 1, where no guide acts
    return shifted


def _unchanged(done: int, x: Tensor) -> Tensor:
    return x


def euler(velocity: Velocity, x: Tensor, grid: Tensor, on_step: OnStep = _unchanged) -> Tensor:
    """Euler's method: first order, one evaluation per step.

    Args:
        velocity: v(x, t).
        x: state at the grid's first time; its dtype is used for the integration.
        grid: decreasing times.
        on_step: called after each step.

    Returns:
        The state at the grid's last time.
    """
    for done, now, then in _steps(grid):
        x = on_step(done, x + (then - now) * velocity(x, now).to(x.dtype))
    return x


def heun(velocity: Velocity, x: Tensor, grid: Tensor, on_step: OnStep = _unchanged) -> Tensor:
    """Heun's method (arXiv 2206.00364, algorithm 1): second order, two evaluations per step.

    As in the paper, a step that ends at t = 0 is an Euler step: the network hardly sees that time in training, and
    one uncorrected step does not lower the order. Arguments as for `euler`.
    """
    for done, now, then in _steps(grid):
        piece = _piece(velocity, now)
        slope = piece(x, now).to(x.dtype)
        ahead = x + (then - now) * slope
        if then > 0.0:
            slope = 0.5 * (slope + piece(ahead, then).to(x.dtype))
        x = on_step(done, x + (then - now) * slope)
    return x


def adams_bashforth_2(velocity: Velocity, x: Tensor, grid: Tensor, on_step: OnStep = _unchanged) -> Tensor:
    """Two-step Adams–Bashforth with variable step size: second order, one evaluation per step.

    The velocity is extrapolated linearly in t from this step and the previous one; the first step, and the first one
    after each jump of the velocity, is an Euler step.
    Arguments as for `euler`.
    """
    return _adams_bashforth(velocity, x, grid, on_step, order=2)


def adams_bashforth_3(velocity: Velocity, x: Tensor, grid: Tensor, on_step: OnStep = _unchanged) -> Tensor:
    """Three-step Adams–Bashforth with variable step size: third order, one evaluation per step.

    It starts, and restarts after each jump of the velocity, with a Heun step (one extra evaluation) and a two-step one.
    Arguments as for `euler`.
    """
    return _adams_bashforth(velocity, x, grid, on_step, order=3)


SOLVERS: Mapping[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "ab2": adams_bashforth_2,
    "ab3": adams_bashforth_3,
}
"""The solvers by their names in configurations and commands."""


def _adams_bashforth(velocity: Velocity, x: Tensor, grid: Tensor, on_step: OnStep, *, order: int) -> Tensor:
    """Adams–Bashforth of a given order (Hairer, Nørsett, Wanner: Solving ODEs I, sections III.1 and III.5)."""
    slopes: list[tuple[float, Tensor]] = []
    before = None
    for done, now, then in _steps(grid):
        piece = _piece(velocity, now)
        if piece != before:
            slopes, before = [], piece
        slope = piece(x, now).to(x.dtype)
        if order > 2 and not slopes and then > 0.0:
            ahead = x + (then - now) * slope
            x = on_step(done, x + 0.5 * (then - now) * (slope + piece(ahead, then).to(x.dtype)))
            slopes = [(now, slope)]
            continue
        slopes = [(now, slope), *slopes[: order - 1]]
        weights = _integrals_of_lagrange_basis([time for time, _ in slopes], now, then)
        for weight, (_, earlier) in zip(weights, slopes, strict=True):
            x = x + weight * earlier
        x = on_step(done, x)
    return x


def _piece(velocity: Velocity, t: float) -> Velocity:
    piece: Callable[[float], Velocity] | None = getattr(velocity, "piece", None)
    return velocity if piece is None else piece(t)


def _integrals_of_lagrange_basis(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Return ∫ ℓⱼ(t) dt from start to end for each of at most four nodes; Simpson's rule is exact for cubics."""
    integrals = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        values = [
            math.prod((t - other) / (node - other) for other in others) for t in (start, 0.5 * (start + end), end)
        ]
        integrals.append((end - start) / 6.0 * (values[0] + 4.0 * values[1] + values[2]))
    return integrals


def _steps(grid: Tensor) -> Iterator[tuple[int, float, float]]:
    """Yield each step as (number from 1, start time, end time)."""
    times: list[float] = grid.tolist()
    if grid.dim() != 1 or len(times) < 2 or any(a <= b for a, b in itertools.pairwise(times)):
        raise ValueError(f"grid: got {times}, expected at least two decreasing times")
    for done, (now, then) in enumerate(itertools.pairwise(times), start=1):
        yield done, now, then
