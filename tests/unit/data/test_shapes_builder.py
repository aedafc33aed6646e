"""Scenes: what is drawn, said and recorded agree, and the held-out combinations stay out of training."""

import hashlib
import itertools
import json
import math
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hdm_lightning.datasets.shapes import (
    ShapesOptions,
    build_shapes,
    make_image,
    make_scene,
    rule_of,
    rule_of_build,
    scene_prompts,
    truth,
)
from hdm_lightning.datasets.shapes_drawing import DISTANCES, EXTENTS, draw
from hdm_lightning.datasets.shapes_scenes import (
    COLOURS,
    GAP,
    MARGIN,
    MIN_CONTRAST,
    SHAPES,
    SIZES,
    Combination,
    Scene,
    SceneObject,
    combinations,
    is_held_out,
)
from hdm_lightning.errors import UserError

MIXED = ShapesOptions(
    objects=((1, 1.0), (2, 1.0), (3, 2.0)), aspects=(0.5, 2.0), continuous_aspects=True, split="train"
)

BUILD_KEYS = {
    *("aspects", "continuous_aspects", "encoding", "multiple", "objects", "resolution", "samples_per_shard"),
    *("seed", "source", "split", "variation"),
}

# Areas in a box one wide: elementary formulas, for the pentagram that of a decagon with alternating radii.
PENTAGRAM_OUTER = 0.5 / math.sin(math.radians(72))
PENTAGRAM_INNER = PENTAGRAM_OUTER * math.cos(math.radians(72)) / math.cos(math.radians(36))
HEART_SIDE = 1 / (1 + math.sqrt(0.5))
AREAS = {
    "circle": math.pi / 4,
    "square": 1.0,
    "triangle": math.sqrt(3) / 4,
    "star": 5 * PENTAGRAM_OUTER * PENTAGRAM_INNER * math.sin(math.radians(36)),
    "cross": 5 / 9,
    "ring": math.pi * (0.5**2 - 0.28**2),
    "heart": HEART_SIDE**2 * (1 + math.pi / 4),
    "diamond": 0.75 / 2,
}


def one(shape, diameter=0.6, width=200, height=200, centre=(0.5, 0.5)):
    thing = SceneObject(Combination("black", shape, "large"), diameter, centre)
    return Scene(width, height, "white", (thing,), ())


def covered(scene):
    return (245 - draw(scene).astype(np.float64)[..., 0]) / 225


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_area_is_the_shape_area(shape):
    for side in (40, 200):
        area = covered(one(shape, width=side, height=side)).sum() / (0.6 * side) ** 2
        assert area == pytest.approx(AREAS[shape], rel=0.02), side


@pytest.mark.parametrize("shape", SHAPES)
def test_recorded_box_is_the_drawn_box(shape):
    scene = one(shape, width=320, height=200, centre=(0.7, 0.45))
    cover = covered(scene)
    rows, columns = np.flatnonzero(cover.max(axis=1) > 0.5), np.flatnonzero(cover.max(axis=0) > 0.5)
    left, top, right, bottom = truth(scene)["objects"][0]["box"]
    drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    # Sharp tips never fill half a pixel, hence two pixels.
    assert np.abs(np.array(drawn) - [left * 320, top * 200, right * 320, bottom * 200]).max() <= 2


@pytest.mark.parametrize("shape", ["triangle", "star", "diamond"])
def test_polygons_agree_with_supersampled_pillow(shape):
    side, factor = 64, 16
    corners = {
        "triangle": [(0, -math.sqrt(3) / 4), (0.5, math.sqrt(3) / 4), (-0.5, math.sqrt(3) / 4)],
        "diamond": [(0, -0.5), (0.375, 0), (0, 0.5), (-0.375, 0)],
        "star": [
            (
                (PENTAGRAM_OUTER, PENTAGRAM_INNER)[i % 2] * math.sin(math.radians(36 * i)),
                EXTENTS["star"][1] / 2
                - PENTAGRAM_OUTER * math.cos(math.radians(36))
                - (PENTAGRAM_OUTER, PENTAGRAM_INNER)[i % 2] * math.cos(math.radians(36 * i)),
            )
            for i in range(10)
        ],
    }[shape]
    large = Image.new("L", (side * factor, side * factor))
    scaled = [((x * 0.6 + 0.5) * side * factor, (y * 0.6 + 0.5) * side * factor) for x, y in corners]
    ImageDraw.Draw(large).polygon(scaled, fill=255)
    expected = np.asarray(large.reduce(factor), dtype=np.float64) / 255
    difference = np.abs(covered(one(shape, width=side, height=side)) - expected)
    assert difference.max() < 0.3  # at tips, where distance stands in for area
    assert difference.mean() < 0.005


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_grows_by_the_step_taken(shape):
    # A signed distance changes by no more than the length of a step, and outside by all of it somewhere.
    x, y = np.linspace(-0.9, 0.9, 181)[None, :], np.linspace(-0.9, 0.9, 181)[:, None]
    field = DISTANCES[shape](x, y)
    assert np.abs(np.diff(field, axis=0)).max() <= 0.01 + 1e-5
    assert np.abs(np.diff(field, axis=1)).max() <= 0.01 + 1e-5


def test_whole_pairs_of_colour_and_shape_are_held_out():
    held, train = combinations("heldout"), combinations("train")
    assert len(held) == 32 and len(train) == 96 and not set(held) & set(train)
    for part, values in ((0, COLOURS), (1, SHAPES), (2, SIZES)):
        assert {c[part] for c in held} == {c[part] for c in train} == set(values)
    pairs = {c[:2] for c in held}
    assert len(pairs) == 16 and not pairs & {c[:2] for c in train}  # in no size
    for part in (0, 1):
        assert set(Counter(pair[part] for pair in pairs).values()) == {2}


def test_the_former_rule_holds_the_same_pairs_out_in_one_size_and_old_records_say_nothing():
    held, train = combinations("heldout", "triples"), combinations("train", "triples")
    assert len(held) == 16 and len(train) == 112
    assert {c[:2] for c in held} == {c[:2] for c in combinations("heldout")} <= {c[:2] for c in train}
    assert rule_of({"objects": []}) == "triples" and rule_of({"held_out": "pairs"}) == "pairs"


def test_the_former_rule_gives_the_scenes_and_the_build_that_it_gave(tmp_path):
    """The hash is of the code before there was a choice (commit 81e97cc)."""
    options = ShapesOptions(seed=7, objects=((1, 1.0), (2, 1.0), (3, 1.0)), aspects=(0.5, 2.0), held_out="triples")
    facts = [make_image(options, index)[1] for index in range(60)]
    expected = "2b8cab37087647b59631b8281f23ea831d4480b1381c0d883a8f1c77b99069e8"
    assert hashlib.sha256(json.dumps(facts).encode()).hexdigest() == expected
    folder = build_shapes(tmp_path, count=3, resolution=32, held_out="triples")
    header = json.loads((folder / "build.jsonl").read_text().splitlines()[0])
    assert set(header) == BUILD_KEYS  # so that a build begun with that code goes on
    assert rule_of_build(folder) == "triples"
    assert rule_of_build(build_shapes(tmp_path / "new", count=3, resolution=32)) == "pairs"


@pytest.mark.parametrize("variation", [0.0, 0.3, 1.0])
def test_scenes_keep_their_promises(variation):
    for index in range(300):
        scene = make_scene(replace(MIXED, variation=variation), index)
        short, facts = min(scene.width, scene.height), truth(scene)
        assert short == 64 and max(scene.width, scene.height) % 8 == 0
        kinds = [o.combination for o in scene.objects]
        assert not any(is_held_out(kind) for kind in kinds)
        assert len({kind[:2] for kind in kinds}) == len(kinds)
        ground = np.array(COLOURS[scene.background])
        assert all(np.linalg.norm(ground - COLOURS[kind.colour]) >= MIN_CONTRAST for kind in kinds)
        for thing in scene.objects:
            extent = (scene.width / short, scene.height / short)
            for place, length in zip(thing.centre, extent, strict=True):
                assert place - thing.diameter / 2 >= MARGIN - 1e-6
                assert place + thing.diameter / 2 <= length - MARGIN + 1e-6
        for a, b in itertools.combinations(scene.objects, 2):
            apart = np.abs(np.subtract(a.centre, b.centre)).max() - (a.diameter + b.diameter) / 2
            assert apart >= GAP - 1e-6
        for subject, relation, reference in scene.relations:
            dx, dy = np.subtract(scene.objects[subject].centre, scene.objects[reference].centre)
            along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
            assert abs(across) <= 0.6 * abs(along) + 1e-6
            assert (along < 0) == (relation in ("left of", "above"))
            assert any(relation in caption for caption in facts["captions"])
        assert len(scene.relations) == len(scene.objects) - 1
        for caption in facts["captions"]:
            assert scene.background in caption
            assert all(word in caption for kind in kinds for word in kind)


def test_without_variation_objects_stand_in_fixed_places():
    options = ShapesOptions(objects=((1, 1.0), (2, 1.0)), aspects=(1.0, 1.5), variation=0.0)
    for index in range(100):
        scene = make_scene(options, index)
        extent = np.array([scene.width, scene.height]) / min(scene.width, scene.height)
        middle = np.mean([thing.centre for thing in scene.objects], axis=0)
        assert np.allclose(middle, extent / 2)
        if len(scene.objects) == 1:
            assert scene.objects[0].diameter == {"small": 0.42, "large": 0.72}[scene.objects[0].combination.size]


@pytest.mark.parametrize(("objects", "small_to", "large_from"), [((1,), 0.42, 0.58), ((2, 3), 0.31, 0.39)])
def test_sizes_do_not_meet(objects, small_to, large_from):
    options = ShapesOptions(objects=tuple((number, 1.0) for number in objects), split="all")
    things = [thing for i in range(300) for thing in make_scene(options, i).objects]
    small = max(t.diameter for t in things if t.combination.size == "small")
    large = min(t.diameter for t in things if t.combination.size == "large")
    assert small <= small_to and large >= large_from


def test_a_build_reads_back(tmp_path):
    build_shapes(tmp_path, count=40, seed=3, objects={1: 1, 2: 1}, aspects=(1.5,), samples_per_shard=25)
    assert [p.name for p in sorted(tmp_path.glob("*.tar"))] == ["shapes-00000.tar", "shapes-00001.tar"]
    options = ShapesOptions(seed=3, objects=((1, 1), (2, 1)), aspects=(1.5,))
    with tarfile.open(tmp_path / "shapes-00001.tar") as tar:
        picture = np.asarray(Image.open(tar.extractfile("00000025.webp")).convert("RGB"))
        facts = json.loads(tar.extractfile("00000025.json").read())
        caption = tar.extractfile("00000025.txt").read().decode()
    scene = make_scene(options, 25)
    assert np.array_equal(picture, draw(scene)) and picture.shape == (64, 96, 3)
    assert facts == {**truth(scene), "held_out": "pairs"} and caption == facts["captions"][0]


def test_processes_do_not_change_a_build(tmp_path):
    for processes in (1, 2):
        build_shapes(tmp_path / str(processes), count=600, resolution=32, processes=processes)
    assert (tmp_path / "1/shapes-00000.tar").read_bytes() == (tmp_path / "2/shapes-00000.tar").read_bytes()


def test_a_build_that_was_cut_short_goes_on_and_another_one_is_refused(tmp_path):
    """The second of three shards is lost with the journal's lines from it on, as a kill would leave them."""
    options = {"count": 30, "samples_per_shard": 10, "resolution": 32}
    whole, cut = build_shapes(tmp_path / "whole", **options), build_shapes(tmp_path / "cut", **options)
    journal = cut / "build.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    first = (cut / "shapes-00000.tar").stat()
    for name in ("shapes-00001.tar", "shapes-00002.tar", "index.json"):
        (cut / name).unlink()
    build_shapes(cut, **options)
    assert (cut / "shapes-00000.tar").stat() == first
    for path in [*whole.glob("*.tar"), whole / "index.json"]:
        assert path.read_bytes() == (cut / path.name).read_bytes()
    with pytest.raises(UserError, match="other options"):
        build_shapes(cut, **{**options, "resolution": 40})


def test_heldout_prompts_cover_every_held_out_combination():
    prompts = scene_prompts(96, split="heldout")
    seen = [Combination(**p.spec["objects"][0]) for p in prompts]
    assert all(seen.count(c) == 3 for c in combinations("heldout"))
    assert prompts == scene_prompts(128, split="heldout")[:96]
    triple = scene_prompts(5, objects=3, split="heldout")[4]
    assert len(triple.spec["objects"]) == 3 and len(triple.spec["relations"]) == 2
    assert all(is_held_out(Combination(**thing)) for thing in triple.spec["objects"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("count", 0), ("resolution", 8), ("aspects", ()), ("objects", (4,)), ("split", "test"), ("held_out", "all")],
)
def test_options_out_of_range_are_named(tmp_path, option, value):
    with pytest.raises(UserError) as caught:
        build_shapes(tmp_path, **{"count": 5, option: value})
    assert caught.value.where == f"--{option.replace('_', '-')}"
    assert not list(tmp_path.glob("*.tar"))
