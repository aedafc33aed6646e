"""Scores against cases worked out by hand; chance against enumeration and closed forms."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from hdm_lightning.generation.scoring import draw_and_score
from hdm_lightning.metrics.prompt_following import (
    CRITERIA,
    Seen,
    chance_levels,
    gap,
    grade,
    grade_images,
    grade_seen,
)

COLOURS = ("red", "yellow", "green", "blue")
SHAPES = ("circle", "square", "star")


def asked(*objects, relations=(), background="white"):
    things = [dict(zip(("colour", "shape", "size"), o.split(), strict=True)) for o in objects]
    return {"objects": things, "relations": [list(r) for r in relations], "background": background}


def seen(*objects, relations=None, background="white"):
    return Seen(tuple(tuple(o.split()) for o in objects), relations or {}, background)


def verdict(spec, sight):
    return {name: (int(r), int(t)) for name, (r, t) in zip(CRITERIA, grade(spec, sight), strict=True)}


def test_single_object_reads_the_largest():
    result = verdict(asked("red circle large"), seen("red square large", "red circle large"))
    assert result["colour"] == (1, 1) and result["shape"] == (0, 1) and result["size"] == (1, 1)
    assert result["colour_and_shape"] == (0, 1) and result["count"] == (0, 1)
    assert result["placement"] == (0, 0) and result["background"] == (1, 1) and result["everything"] == (0, 1)


def test_nothing_found_is_wrong_everywhere_but_the_background():
    result = verdict(asked("red circle large"), seen())
    assert [name for name, (right, _) in result.items() if right] == ["background"]


def test_pairing_takes_most_attributes_and_the_relation_follows_it():
    spec = asked("red circle large", "blue star small", relations=[(0, "left of", 1)])
    sight = seen("blue star small", "red circle large", relations={(1, 0): "left of", (0, 1): "right of"})
    result = verdict(spec, sight)
    assert all(right == trials for right, trials in result.values())
    assert result["colour"] == (2, 2) and result["placement"] == result["relation_bound"] == (1, 1)
    swapped = seen("blue star small", "red circle large", relations={(1, 0): "right of", (0, 1): "left of"})
    assert verdict(spec, swapped)["placement"] == (0, 1)
    assert verdict(spec, swapped)["everything"] == (0, 1)


def test_a_missing_object_is_wrong():
    spec = asked("red circle large", "blue star small", relations=[(0, "above", 1)])
    result = verdict(spec, seen("blue star small"))
    assert result["colour"] == (1, 2) and result["placement"] == (0, 1) and result["count"] == (0, 1)


def test_chance_on_a_balanced_set_is_one_in_the_number_of_answers():
    specs = [asked(f"{c} {s} {z}") for c in COLOURS for s in SHAPES for z in ("small", "large")]
    chance = chance_levels(specs)
    assert chance["colour"] == pytest.approx(1 / 4) and chance["shape"] == pytest.approx(1 / 3)
    assert chance["colour_and_shape"] == pytest.approx(1 / 12) and chance["size"] == pytest.approx(1 / 2)
    assert chance["everything"] == pytest.approx(1 / 24) and chance["count"] == 1.0
    assert "placement" not in chance


def test_chance_of_relations_alone_is_one_in_four():
    words = ("left of", "right of", "above", "below")
    specs = [asked("red circle large", "blue star small", relations=[(0, w, 1)]) for w in words]
    assert chance_levels(specs)["placement"] == pytest.approx(1 / 4)


def test_repeated_prompts_weigh_in_chance():
    specs = [asked("red circle large")] * 3 + [asked("blue circle large")]
    expected = np.mean([a == b for a, b in itertools.product("rrrb", repeat=2)])
    assert chance_levels(specs)["colour"] == pytest.approx(expected)


def test_chance_may_pick_among_other_prompts():
    blind = [asked(f"{c} {s} large") for c in COLOURS for s in SHAPES]
    chance = chance_levels([asked("red circle large"), asked("blue star large")], blind)
    assert chance["colour_and_shape"] == pytest.approx(1 / 12) and chance["size"] == 1.0


def test_placement_pays_for_grey_squares_and_the_bound_relation_does_not():
    spec = asked("red circle large", "blue star small", relations=[(0, "left of", 1)])
    stands = {(0, 1): "left of", (1, 0): "right of"}
    result = verdict(spec, seen("black square large", "black square small", relations=stands))
    assert result["placement"] == (1, 1) and result["relation_bound"] == (0, 1)
    swapped = seen("blue circle large", "red star small", relations=stands)  # colours in the wrong places
    assert verdict(spec, swapped)["placement"] == (1, 1) and verdict(spec, swapped)["relation_bound"] == (0, 1)


def test_an_image_with_everything_in_it_has_no_colour_right():
    spec = asked("red circle large", "blue star small", relations=[(0, "left of", 1)])
    stands = {(0, 1): "left of", (1, 0): "right of"}
    crowd = seen("red circle large", "blue star small", "red star small", "blue circle large", relations=stands)
    result = verdict(spec, crowd)
    assert result["colour"] == result["shape"] == result["colour_and_shape"] == (0, 2)
    assert result["relation_bound"] == (0, 1) and result["count"] == (0, 1)


def of_combinations(shares, each):
    """Specs and sights of combinations, of which a given share of `each` images has the colour right."""
    kinds = [f"{colour} {shape} large" for shape in SHAPES for colour in COLOURS][: len(shares)]
    specs = [asked(kind) for kind in kinds for _ in range(each)]
    sights = []
    for kind, share in zip(kinds, shares, strict=True):
        wrong = "black " + kind.split(" ", 1)[1]
        sights += [seen(kind)] * round(share * each) + [seen(wrong)] * (each - round(share * each))
    return specs, sights


def test_where_combinations_differ_they_are_what_counts():
    """Six combinations always right and six never are twelve trials, however many images of each there are."""
    few, many = (grade_seen(*of_combinations([1.0] * 6 + [0.0] * 6, each)).scores()["colour"] for each in (4, 40))
    assert [many[key] for key in ("right", "trials", "units", "share")] == [240, 480, 12, 0.5]
    assert (many["low"], many["high"]) == pytest.approx((few["low"], few["high"]))
    of_combinations_alone = scipy.stats.ttest_1samp([1.0] * 6 + [0.0] * 6, 0.5).confidence_interval()
    assert many["high"] == pytest.approx(of_combinations_alone.high, abs=0.06)  # a score interval is a little shorter
    assert many["low"] == pytest.approx(of_combinations_alone.low, abs=0.06)


def test_where_combinations_are_alike_images_count_and_more_of_them_narrow_the_interval():
    widths, t = [], scipy.stats.t.ppf(0.975, 11)
    for each in (4, 40):
        score = grade_seen(*of_combinations([0.75] * 12, each)).scores()["colour"]
        ends = [
            scipy.optimize.brentq(lambda p, n=12 * each: (0.75 - p) ** 2 - t**2 * p * (1 - p) / n, *within)
            for within in ((1e-9, 0.75), (0.75, 1 - 1e-9))
        ]
        assert (score["low"], score["high"]) == pytest.approx(tuple(ends))  # the score test inverted, by its definition
        widths.append(score["high"] - score["low"])
    assert widths[1] < 0.4 * widths[0]


def test_images_graded_one_by_one_add_up():
    specs, sights = of_combinations([1.0, 0.5, 0.25], 8)
    graded = grade_seen(specs, sights)
    kept = graded.to_json()
    assert sum(kept["right"]["colour"]) == 8 + 4 + 2 and sum(kept["trials"]["colour"]) == 24
    assert kept["units"][0] == ["red circle"] and set(kept["right"]) == set(graded.chance)


def test_the_gap_between_seen_and_unseen_is_their_difference():
    good = grade_seen(*of_combinations([1.0] * 12, 4)).estimates()["colour"]
    bad = grade_seen(*of_combinations([0.5] * 12, 4)).estimates()["colour"]
    found = gap(good, bad)
    assert found.value == 0.5 and 0 < found.low < 0.5 < found.high
    assert gap(bad, bad).low < 0 < gap(bad, bad).high


def test_drawing_and_scoring_numbers_the_seeds():
    image = torch.full((3, 64, 64), 245, dtype=torch.uint8)
    image[:, 20:55, 8:43] = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
    specs = [asked("red square large"), asked("blue square small")] * 8

    class Pipeline:
        def draw(self, captions, seeds, settings, progress):
            assert seeds == list(range(3, 19))
            return torch.stack([image] * len(captions))

    scored = draw_and_score(Pipeline(), [""] * 16, specs, None, seed=3)
    assert scored.graded.scores()["colour"]["right"] == 8


def test_images_are_read_and_scored():
    image = np.full((64, 64, 3), 245, dtype=np.uint8)
    image[20:55, 8:43] = (220, 40, 40)
    scores = grade_images([asked("red square large"), asked("blue square small")], [image, image]).scores()
    right = {name: score["right"] for name, score in scores.items()}
    assert (right["colour"], right["shape"], right["everything"]) == (1, 2, 1)
    with pytest.raises(ValueError, match="2 specs and 1 images"):
        grade_images([asked("red square large")] * 2, [image])
