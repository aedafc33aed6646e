"""Curves with intervals as inline SVG that takes its colours from the page."""

import math
from collections.abc import Callable, Mapping
from html import escape
from itertools import pairwise

from hdm_lightning.evaluation.results import Curve

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 46
TICKS = 5


def chart(curves: Mapping[str, Curve]) -> str:
    """One chart of the same curve of several weights.

    Args:
        curves: name of the weights to their curve; class `series-K` gives the K-th its colour.
    """
    first = next(iter(curves.values()))
    lows = [estimate.low for curve in curves.values() for estimate in curve.estimates]
    highs = [estimate.high for curve in curves.values() for estimate in curve.estimates]
    bottom, top = _room(min(lows), max(highs))
    left, right = _room(min(first.x), max(first.x))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(first.title)}">']
    for y in _ticks(bottom, top):
        height = place(left, y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in first.x:
        parts.append(
            f'<text x="{place(x, bottom)[0]:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:.3g}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(first.x_label)}</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">'
        f"{escape(first.y_label)}</text>"
    )
    for number, (name, curve) in enumerate(curves.items()):
        parts += _series(number, name, curve, place)
    return "".join([*parts, "</svg>"])


def _series(number: int, name: str, curve: Curve, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    points = [place(x, estimate.value) for x, estimate in zip(curve.x, curve.estimates, strict=True)]
    parts = [f'<g class="series-{number}"><title>{escape(name)}</title>']
    parts += [
        f'<line x1="{one[0]:.1f}" y1="{one[1]:.1f}" x2="{other[0]:.1f}" y2="{other[1]:.1f}"/>'
        for one, other in pairwise(points)
    ]
    for x, estimate, (across, height) in zip(curve.x, curve.estimates, points, strict=True):
        low, high = place(x, estimate.low)[1], place(x, estimate.high)[1]
        parts.append(f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(f'<circle cx="{across:.1f}" cy="{height:.1f}" r="3"/>')
    return [*parts, "</g>"]


def _ticks(bottom: float, top: float) -> list[float]:
    """Round numbers within the range, 1, 2 or 5 times a power of ten apart, about `TICKS` of them."""
    rough = (top - bottom) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(bottom / step), math.floor(top / step) + 1)]


def _room(low: float, high: float) -> tuple[float, float]:
    """The range with a little room on both sides."""
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - margin, high + margin
