"""Crops as arithmetic."""

from collections import Counter
from itertools import pairwise
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdm_lightning.data.crops import AspectCounts, Buckets, CropRules, covering_size
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws
from hdm_lightning.errors import UserError

SIDE = st.integers(1, 5000)


@given(SIDE, SIDE, st.sampled_from([1, 16, 64, 256]))
@settings(max_examples=200, deadline=None)
def test_the_short_side_fits_exactly_and_the_long_side_keeps_the_ratio(height, width, resolution):
    full_height, full_width = covering_size(height, width, resolution, resolution)
    assert min(full_height, full_width) == resolution
    exact = resolution * max(height, width) / min(height, width)
    assert abs(max(full_height, full_width) - exact) <= 0.5


@given(SIDE, SIDE, st.integers(0, 10**6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_crop_lies_in_its_image_and_moves_along_the_long_side_only(height, width, key, centre):
    rules = CropRules(max_aspect=inf, centre=centre)
    crop = rules.choose(height, width, (64, 64), Draws(key))
    assert (crop.height, crop.width) == (64, 64)
    assert 0 <= crop.top <= crop.full_height - 64 and 0 <= crop.left <= crop.full_width - 64
    assert crop.top == 0 or crop.left == 0
    assert crop.numbers == (crop.top, crop.left, crop.full_height, crop.full_width)
    if centre:
        assert abs(crop.full_width - 64 - 2 * crop.left) <= 1 and abs(crop.full_height - 64 - 2 * crop.top) <= 1


def test_every_offset_of_the_long_side_comes_equally_often_both_ends_included():
    rules = CropRules()
    lefts = Counter(rules.choose(64, 70, (64, 64), Draws(number)).left for number in range(7000))
    assert sorted(lefts) == list(range(7))
    assert all(abs(count - 1000) < 4.5 * (7000 * 6 / 49) ** 0.5 for count in lefts.values())
    tops = {rules.choose(33, 32, (32, 32), Draws(number)).top for number in range(50)}
    assert tops == {0, 1}


@pytest.mark.parametrize(
    ("rules", "size", "reason"),
    [
        (CropRules(min_size_px=40), (39, 80), "too small"),
        (CropRules(min_size_px=40), (40, 80), None),
        (CropRules(max_upscale=2.0), (31, 40), "enlarged"),
        (CropRules(max_upscale=2.0), (32, 40), None),
        (CropRules(max_aspect=2.0), (41, 20), "too long"),
        (CropRules(max_aspect=2.0), (20, 40), None),
        (CropRules(), (1, 5000), "too long"),
    ],
)
def test_limits_are_the_same_for_one_image_and_for_columns(rules, size, reason):
    accepted = rules.accepts(np.array([size[0], 0]), np.array([size[1], 0]), 64).tolist()
    assert accepted == [reason is None, True]
    if reason is None:
        rules.choose(*size, (64, 64), Draws(0))
    else:
        with pytest.raises(SampleFault, match=reason):
            rules.choose(*size, (64, 64), Draws(0))


def test_flips_are_off_by_default_half_when_on_and_never_where_forbidden():
    def share(rules, may_flip):
        return np.mean([rules.choose(64, 64, (64, 64), Draws(n), may_flip=may_flip).flip for n in range(2000)])

    assert share(CropRules(), True) == 0
    assert share(CropRules(flip=True), False) == 0
    assert abs(share(CropRules(flip=True), True) - 0.5) < 4 * 0.5 / 2000**0.5


def test_flipping_moves_no_offset():
    """The offset is drawn before the coin, so that crops with and without flips can be compared."""
    plain = [CropRules().choose(64, 90, (64, 64), Draws(n)).left for n in range(50)]
    flipped = [CropRules(flip=True).choose(64, 90, (64, 64), Draws(n), may_flip=True).left for n in range(50)]
    assert plain == flipped


def test_bucket_shapes_have_about_the_area_and_the_limits():
    buckets = Buckets(step_px=64, max_aspect=2.0)
    shapes = buckets.shapes(512)
    assert (512, 512) in shapes and (384, 640) in shapes and (640, 384) in shapes
    for height, width in shapes:
        assert height % 64 == 0 and width % 64 == 0
        assert 0.75 * 512**2 < height * width <= 512**2
        assert max(height, width) <= 2 * min(height, width)
    with pytest.raises(UserError, match="multiples of 64"):
        buckets.shapes(32)


@pytest.mark.parametrize(("step", "resolution", "aspect"), [(64, 512, 2.0), (8, 64, 3.0), (16, 256, 1.0), (1, 40, 2.0)])
def test_the_nearest_shape_is_the_first_of_those_with_the_least_distance(step, resolution, aspect):
    random, buckets = np.random.default_rng(step), Buckets(step, aspect, 1)
    shapes = list(buckets.shapes(resolution))
    height, width = random.integers(0, 600, (2, 20_000))
    height[: len(shapes)], width[: len(shapes)] = zip(*shapes, strict=True)
    height[:3], width[:3] = (4, 6, 900), (9, 4, 100)
    for _ in range(3):
        sides = zip(np.maximum(height, 1).tolist(), np.maximum(width, 1).tolist(), strict=True)
        assert buckets.nearest(height, width, shapes).tolist() == [
            first_of_the_nearest(shapes, *each) for each in sides
        ]
        shapes = shapes[:: 2 if len(shapes) > 2 else 1]


def first_of_the_nearest(shapes, height, width):
    """In integers: a shape is left for the next, wider one while the ratio is beyond the mean of theirs."""
    number = 0
    for (high, wide), (lower, wider) in pairwise(shapes):
        if width**2 * high * lower <= height**2 * wide * wider:
            break
        number += 1
    return number


@pytest.mark.parametrize(("step", "aspect", "limit"), [(64, 2.0, 900), (8, 3.0, 300), (16, 8.0, 2000)])
def test_images_are_shared_out_among_some_shapes_as_if_each_was_looked_at(step, aspect, limit):
    """Shards of images added one after the other, and what is counted of each."""
    random, buckets = np.random.default_rng(step), Buckets(step, aspect, 1)
    shapes = buckets.shapes(256)
    images, others, sizes = AspectCounts(shapes), AspectCounts(shapes), random.integers(1, limit, (5, 2, 700))
    for number, (height, width) in enumerate(sizes):
        own = np.bincount(buckets.nearest(height, width, shapes), minlength=len(shapes))
        assert np.array_equal((others if number < 2 else images).add(height, width), own)
    images.include(others)
    height, width = sizes.transpose(1, 0, 2).reshape(2, -1)
    for _ in range(20):
        some = [each for each in shapes if random.random() < 0.5] or shapes[:1]
        counts = np.bincount(buckets.nearest(height, width, some), minlength=len(some))
        assert np.array_equal(images.nearest_to(some), counts)


def test_images_go_to_the_nearest_bucket_and_rare_buckets_are_given_up():
    buckets = Buckets(step_px=64, max_aspect=4.0, block=10)
    shapes = buckets.shapes(256)
    height = np.array([100] * 30 + [100] * 5 + [200] * 25)
    width = np.array([100] * 30 + [400] * 5 + [100] * 25)
    names = [shapes[number] for number in buckets.nearest(height, width, shapes)]
    assert names[0] == (256, 256) and names[30] == (128, 512)
    brute = [
        min(shapes, key=lambda s: abs(np.log(s[1] / s[0]) - np.log(w / h))) for h, w in zip(height, width, strict=True)
    ]
    assert [a[1] / a[0] for a in names] == [b[1] / b[0] for b in brute]
    images = AspectCounts(shapes)
    images.add(height, width)
    used = buckets.shapes_in_use(images)
    counts = np.bincount(buckets.nearest(height, width, used), minlength=len(used))
    assert counts.sum() == 60 and counts.min() >= 10 and (256, 256) in used and (128, 512) not in used
    few = AspectCounts(shapes)
    few.add(height[:4], width[:4])
    with pytest.raises(UserError, match="fewer than a block") as caught:
        buckets.shapes_in_use(few)
    assert caught.value.where == "data.crop.buckets"  # no key may set its block


@given(SIDE, SIDE)
@settings(max_examples=100, deadline=None)
def test_bucket_crops_cover_their_shape(height, width):
    crop = CropRules(max_aspect=inf).choose(height, width, (192, 320), Draws(height, width))
    assert crop.full_height == 192 or crop.full_width == 320
    assert crop.full_height >= 192 and crop.full_width >= 320
    assert 0 <= crop.top <= crop.full_height - 192 and 0 <= crop.left <= crop.full_width - 320
