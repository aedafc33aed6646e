"""The reader against drawings whose truth is known, clean and spoilt, at every size."""

import numpy as np
import pytest
from scipy import ndimage

from hdm_lightning.datasets.shapes import ShapesOptions, make_image
from hdm_lightning.metrics.shapes_ideal import ideal_shapes
from hdm_lightning.metrics.shapes_reader import connected_components, read_shapes

SQUARE, WIDE_AND_TALL = (1.0,), (2.0, 0.5)


def spoil(picture, rng, *, blur=0.0, noise=0.0, shift=0.0):
    values = ndimage.gaussian_filter(picture.astype(np.float64), (blur, blur, 0), mode="nearest")
    values = values * rng.uniform(1 - shift / 100, 1 + shift / 100, 3) + rng.uniform(-shift, shift, 3)
    return np.clip(np.rint(values + rng.normal(0, noise, values.shape)), 0, 255).astype(np.uint8)


def reads_right(picture, facts):
    reading = read_shapes(picture)
    found, wanted = list(reading.objects), facts["objects"]
    if len(found) != len(wanted) or reading.background != facts["background"]:
        return False
    centres = np.array([o.centre for o in found])
    order = [int(np.linalg.norm(centres - w["centre"], axis=1).argmin()) for w in wanted]
    for want, place in zip(wanted, order, strict=True):
        got = found[place]
        if (got.colour, got.shape, got.size) != (want["colour"], want["shape"], want["size"]):
            return False
        scale = np.array([reading.width, reading.height] * 2) / min(reading.width, reading.height)
        if (np.abs(np.subtract(got.box, want["box"])) * scale).max() > 0.06:
            return False
    return all(reading.relation(order[i], order[j]) == word for i, word, j in facts["relations"])


def share_right(resolution, aspects, count, **spoiling):
    options = ShapesOptions(
        seed=11, resolution=resolution, aspects=aspects, objects=((1, 1.0), (2, 1.0), (3, 1.0)), split="all"
    )
    rng = np.random.default_rng(5)
    samples = [make_image(options, index) for index in range(count)]
    return np.mean([reads_right(spoil(picture, rng, **spoiling), facts) for picture, facts in samples])


@pytest.mark.parametrize("aspects", [SQUARE, WIDE_AND_TALL])
@pytest.mark.parametrize("resolution", [32, 64, 96, 128, 256])
def test_clean_pictures(resolution, aspects):
    assert share_right(resolution, aspects, 40) >= 0.99


@pytest.mark.parametrize(
    "spoiling",
    [{"blur": 0.5}, {"blur": 1.0}, {"noise": 8.0}, {"shift": 12.0}, {"blur": 0.7, "noise": 8.0, "shift": 8.0}],
)
@pytest.mark.parametrize("resolution", [32, 64])
def test_spoilt_pictures(resolution, spoiling):
    assert share_right(resolution, SQUARE, 40, **spoiling) >= 0.98


def test_ideal_areas_are_the_elementary_ones():
    areas = {shape.name: shape.cumulative[-1, -1] for shape in ideal_shapes()}
    expected = {"circle": np.pi / 4, "square": 1, "triangle": 3**0.5 / 4, "cross": 5 / 9, "diamond": 0.375}
    for name, area in expected.items():
        assert areas[name] == pytest.approx(area, rel=0.01)


def test_cover_of_a_square_is_exact():
    square = next(shape for shape in ideal_shapes() if shape.name == "square")
    cover = square.cover((4, 6), (2.75, 2.0), 2.5)
    rows, columns = [0.25, 1, 1, 0.25], [0, 0.5, 1, 1, 0, 0]
    assert cover.sum() == pytest.approx(2.5**2)
    np.testing.assert_allclose(cover, np.outer(rows, columns), atol=1e-9)


def test_components_agree_with_scipy():
    rng = np.random.default_rng(0)
    for density in (0.3, 0.5, 0.6, 0.8):
        mask = rng.random((40, 57)) < density
        labels, count = connected_components(mask)
        expected, expected_count = ndimage.label(mask)
        assert count == expected_count
        pairs = set(zip(labels[mask].tolist(), expected[mask].tolist(), strict=True))
        assert len(pairs) == count and (labels[~mask] == 0).all()


def test_a_blob_of_no_known_shape_and_colour_has_no_name():
    picture = np.full((64, 64, 3), 245, dtype=np.uint8)
    picture[10:50, 10:14] = picture[46:50, 10:54] = (128, 128, 128)
    thing = read_shapes(picture).objects[0]
    assert thing.shape is None and thing.colour is None


def test_an_empty_picture_and_bad_ones():
    assert read_shapes(np.full((40, 40, 3), 20, dtype=np.uint8)).objects == ()
    with pytest.raises(ValueError, match="expected uint8"):
        read_shapes(np.zeros((3, 64, 64), dtype=np.uint8))
    with pytest.raises(ValueError, match="at least 32"):
        read_shapes(np.zeros((31, 64, 3), dtype=np.uint8))
