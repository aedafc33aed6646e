"""Draw a scene with smooth edges from signed distances. H, W: image in pixels; h, w: an object's patch.

Every shape fills a box whose longer side is 1 and whose center is the origin; y points down. A pixel's coverage is
1/2 − d/pixel clipped to [0, 1] for the signed distance d of its center from the outline (negative inside).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.datasets.shapes_scenes import COLOURS, Scene, SceneObject

Floats = NDArray[np.floating[Any]]
Distance = Callable[[Floats, Floats], Floats]
Box = tuple[float, float, float, float]


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Return the image of a scene: uint8 (H, W, 3), RGB."""
    image = np.empty((scene.height, scene.width, 3), dtype=np.float32)
    image[:] = COLOURS[scene.background]
    for thing in scene.objects:
        _paint(image, thing, min(scene.width, scene.height))
    return np.rint(image).astype(np.uint8)


def box_of(thing: SceneObject, scene: Scene) -> Box:
    """Return the object's tight box (left, top, right, bottom) in fractions of the image's width and height."""
    short = min(scene.width, scene.height)
    width, height = EXTENTS[thing.combination.shape]
    x, y = thing.centre
    reach_x, reach_y = thing.diameter * width / 2, thing.diameter * height / 2
    across, down = scene.width / short, scene.height / short
    return (x - reach_x) / across, (y - reach_y) / down, (x + reach_x) / across, (y + reach_y) / down


def _paint(image: Floats, thing: SceneObject, short: int) -> None:
    side = thing.diameter * short
    x, y = thing.centre[0] * short, thing.centre[1] * short
    reach = side / 2 + 1
    left, right = max(0, math.floor(x - reach)), min(image.shape[1], math.ceil(x + reach))
    top, bottom = max(0, math.floor(y - reach)), min(image.shape[0], math.ceil(y + reach))
    across = ((np.arange(left, right, dtype=np.float32) + 0.5 - x) / side)[None, :]
    down = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - y) / side)[:, None]
    distance = DISTANCES[thing.combination.shape](across, down) * side
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    patch = image[top:bottom, left:right]
    patch += cover * (np.array(COLOURS[thing.combination.colour], dtype=np.float32) - patch)


def _rectangle(x: Floats, y: Floats, half_width: float, half_height: float) -> Floats:
    beyond_x, beyond_y = np.abs(x) - half_width, np.abs(y) - half_height
    outside = np.hypot(np.maximum(beyond_x, 0), np.maximum(beyond_y, 0))
    return outside + np.minimum(np.maximum(beyond_x, beyond_y), 0)


def _polygon(vertices: list[tuple[float, float]]) -> Distance:
    """Return the signed distance from a closed polygon: nearest edge, with the sign of an even-odd crossing test."""
    edges = list(zip(vertices, vertices[1:] + vertices[:1], strict=True))

    def distance(x: Floats, y: Floats) -> Floats:
        nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, dtype=np.float32)
        inside = np.zeros(nearest.shape, dtype=bool)
        for (ax, ay), (bx, by) in edges:
            run, rise = bx - ax, by - ay
            part = np.clip(((x - ax) * run + (y - ay) * rise) / (run * run + rise * rise), 0, 1)
            np.minimum(nearest, (x - ax - part * run) ** 2 + (y - ay - part * rise) ** 2, out=nearest)
            if rise:
                inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (run / rise))
        return np.where(inside, -1, 1).astype(np.float32) * np.sqrt(nearest)

    return distance


def _star_vertices() -> list[tuple[float, float]]:
    """Return the ten corners of a regular pentagram's outline, one box wide, centered on its box."""
    outer = 0.5 / math.sin(math.radians(72))
    inner = outer * math.sin(math.radians(18)) / math.sin(math.radians(54))
    radii = [outer, inner] * 5
    corners = [(r * math.sin(math.radians(36 * i)), -r * math.cos(math.radians(36 * i))) for i, r in enumerate(radii)]
    middle = (min(y for _, y in corners) + max(y for _, y in corners)) / 2
    return [(x, y - middle) for x, y in corners]


# A heart is a square on its corner and two circles on its upper edges; this side makes it one box wide.
_HEART_SIDE = 1 / (1 + math.sqrt(0.5))
_HEART_TOP = -_HEART_SIDE * (0.5 + math.sqrt(0.125))
_HEART_MIDDLE = (_HEART_TOP + _HEART_SIDE * math.sqrt(0.5)) / 2


def _heart(x: Floats, y: Floats) -> Floats:
    side, x, y = _HEART_SIDE, np.abs(x), y + np.float32(_HEART_MIDDLE)
    lobe = np.hypot(x - side * math.sqrt(0.125), y + side * math.sqrt(0.125)) - side / 2
    turned = (x + y) * math.sqrt(0.5), (y - x) * math.sqrt(0.5)
    return np.minimum(lobe, _rectangle(turned[0], turned[1], side / 2, side / 2))


_STAR = _star_vertices()
_STAR_HEIGHT = max(y for _, y in _STAR) - min(y for _, y in _STAR)
_TRIANGLE_HEIGHT, _DIAMOND_WIDTH = math.sqrt(0.75), 0.75

DISTANCES: dict[str, Distance] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.5,
    "square": lambda x, y: _rectangle(x, y, 0.5, 0.5),
    "triangle": _polygon([(0, -_TRIANGLE_HEIGHT / 2), (0.5, _TRIANGLE_HEIGHT / 2), (-0.5, _TRIANGLE_HEIGHT / 2)]),
    "star": _polygon(_STAR),
    "cross": lambda x, y: np.minimum(_rectangle(x, y, 0.5, 1 / 6), _rectangle(x, y, 1 / 6, 0.5)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.39) - 0.11,
    "heart": _heart,
    "diamond": _polygon([(0, -0.5), (_DIAMOND_WIDTH / 2, 0), (0, 0.5), (-_DIAMOND_WIDTH / 2, 0)]),
}
# Width and height of each shape's tight box.
EXTENTS: dict[str, tuple[float, float]] = {
    "circle": (1, 1),
    "square": (1, 1),
    "triangle": (1, _TRIANGLE_HEIGHT),
    "star": (1, _STAR_HEIGHT),
    "cross": (1, 1),
    "ring": (1, 1),
    "heart": (1, 2 * (_HEART_MIDDLE - _HEART_TOP)),
    "diamond": (_DIAMOND_WIDTH, 1),
}
