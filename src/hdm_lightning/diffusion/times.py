"""The times at which a sampler evaluates the velocity: decreasing grids from noise (1) to the image (0)."""

import torch
from torch import Tensor

LARGEST_SHIFT = 1e6
"""Largest shift of a time grid; beyond it, all steps but the last are in pure noise."""


def uniform_grid(steps: int, *, start: float = 1.0) -> Tensor:
    """Return a grid of equal steps from `start` to 0.

    Args:
        steps: number of steps, at least 1.
        start: first time, in (0, 1]; below 1 for image-to-image.

    Returns:
        `steps` + 1 decreasing times, float64 on the CPU.

    Raises:
        ValueError: an argument is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    if not 0.0 < start <= 1.0:
        raise ValueError(f"start: got {start}, expected 0 < start ≤ 1")
    return torch.linspace(start, 0.0, steps + 1, dtype=torch.float64)


def shifted_grid(steps: int, shift: float, *, start: float = 1.0) -> Tensor:
    """Return a uniform grid shifted toward noise, t ← shift·t / (1 + (shift − 1)·t) (arXiv 2403.03206, equation 23).

    Args:
        steps: number of steps, at least 1.
        shift: above 0, at most `LARGEST_SHIFT`; 1 leaves the grid uniform, above 1 spends more steps near noise.
        start: first time after the shift, in (0, 1].

    Returns:
        `steps` + 1 decreasing times, float64 on the CPU.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0.0 < shift <= LARGEST_SHIFT:
        raise ValueError(f"shift: got {shift}, expected above 0 and at most {LARGEST_SHIFT:g}")
    if not 0.0 < start <= 1.0:
        raise ValueError(f"start: got {start}, expected 0 < start ≤ 1")
    start_before_shift = start / (shift * (1.0 - start) + start)  # this form subtracts no two large numbers
    grid = uniform_grid(steps, start=start_before_shift)
    return shift * grid / (1.0 + (shift - 1.0) * grid)
