"""Scores against cases worked out by hand; chance against enumeration and closed forms."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from hdm_lightning.generation.scoring import draw_and_score
from hdm_lightning.metrics.bootstrap import Bootstrap
from hdm_lightning.metrics.prompt_following import CRITERIA, Seen, chance_levels, grade, score_images, score_seen

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
    assert result["relation"] == (0, 0) and result["background"] == (1, 1) and result["everything"] == (0, 1)


def test_nothing_found_is_wrong_everywhere_but_the_background():
    result = verdict(asked("red circle large"), seen())
    assert [name for name, (right, _) in result.items() if right] == ["background"]


def test_pairing_takes_most_attributes_and_the_relation_follows_it():
    spec = asked("red circle large", "blue star small", relations=[(0, "left of", 1)])
    sight = seen("blue star small", "red circle large", relations={(1, 0): "left of", (0, 1): "right of"})
    result = verdict(spec, sight)
    assert all(right == trials for right, trials in result.values())
    assert result["colour"] == (2, 2) and result["relation"] == (1, 1)
    swapped = seen("blue star small", "red circle large", relations={(1, 0): "right of", (0, 1): "left of"})
    assert verdict(spec, swapped)["relation"] == (0, 1)
    assert verdict(spec, swapped)["everything"] == (0, 1)


def test_a_missing_object_is_wrong():
    spec = asked("red circle large", "blue star small", relations=[(0, "above", 1)])
    result = verdict(spec, seen("blue star small"))
    assert result["colour"] == (1, 2) and result["relation"] == (0, 1) and result["count"] == (0, 1)


def test_chance_on_a_balanced_set_is_one_in_the_number_of_answers():
    specs = [asked(f"{c} {s} {z}") for c in COLOURS for s in SHAPES for z in ("small", "large")]
    chance = chance_levels(specs)
    assert chance["colour"] == pytest.approx(1 / 4) and chance["shape"] == pytest.approx(1 / 3)
    assert chance["colour_and_shape"] == pytest.approx(1 / 12) and chance["size"] == pytest.approx(1 / 2)
    assert chance["everything"] == pytest.approx(1 / 24) and chance["count"] == 1.0
    assert "relation" not in chance


def test_chance_of_relations_alone_is_one_in_four():
    words = ("left of", "right of", "above", "below")
    specs = [asked("red circle large", "blue star small", relations=[(0, w, 1)]) for w in words]
    assert chance_levels(specs)["relation"] == pytest.approx(1 / 4)


def test_repeated_prompts_weigh_in_chance():
    specs = [asked("red circle large")] * 3 + [asked("blue circle large")]
    expected = np.mean([a == b for a, b in itertools.product("rrrb", repeat=2)])
    assert chance_levels(specs)["colour"] == pytest.approx(expected)


def test_chance_may_pick_among_other_prompts():
    blind = [asked(f"{c} {s} large") for c in COLOURS for s in SHAPES]
    chance = chance_levels([asked("red circle large"), asked("blue star large")], blind)
    assert chance["colour_and_shape"] == pytest.approx(1 / 12) and chance["size"] == 1.0


def test_interval_is_the_binomial_one():
    specs = [asked("red circle large")] * 400
    sights = [seen("red circle large")] * 300 + [seen("blue circle large")] * 100
    score = score_seen(specs, sights, seed=1)["colour"]
    deviation = (0.75 * 0.25 / 400) ** 0.5
    assert (score.right, score.trials, score.share) == (300, 400, 0.75)
    assert score.low == pytest.approx(0.75 - 1.96 * deviation, abs=0.006)
    assert score.high == pytest.approx(0.75 + 1.96 * deviation, abs=0.006)
    assert score == score_seen(specs, sights, seed=1)["colour"]


def test_a_lower_confidence_makes_a_narrower_interval():
    specs = [asked("red circle large")] * 400
    sights = [seen("red circle large")] * 300 + [seen("blue circle large")] * 100
    score = score_seen(specs, sights, resamples=4000, confidence=0.5)["colour"]
    deviation = (0.75 * 0.25 / 400) ** 0.5
    assert score.low == pytest.approx(0.75 - 0.674 * deviation, abs=0.004)
    assert score.high == pytest.approx(0.75 + 0.674 * deviation, abs=0.004)
    scores = score_seen([asked("red circle large")] * 20, [seen("red circle large")] * 20, confidence=0.5)
    assert scores["colour"].low == pytest.approx(scipy.stats.beta.ppf(0.25, 20, 1))


def test_drawing_and_scoring_hands_the_resampling_on():
    image = torch.full((3, 64, 64), 245, dtype=torch.uint8)
    image[:, 20:55, 8:43] = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
    specs = [asked("red square large"), asked("blue square small")] * 8

    class Pipeline:
        def draw(self, captions, seeds, settings, progress):
            assert seeds == list(range(3, 19))
            return torch.stack([image] * len(captions))

    wide, narrow = (
        draw_and_score(Pipeline(), [""] * 16, specs, None, seed=3, intervals=Bootstrap(300, confidence=share)).scores
        for share in (0.95, 0.5)
    )
    assert narrow["colour"].share == wide["colour"].share == 0.5
    assert narrow["colour"].high - narrow["colour"].low < 0.5 * (wide["colour"].high - wide["colour"].low)


def test_where_all_pictures_agree_the_interval_is_the_exact_one_of_a_proportion():
    specs = [asked("red circle large", "blue star small")] * 40  # 80 trials, but only 40 pictures are independent
    scores = score_seen(specs, [seen("red circle large", "blue star small")] * 40)
    assert scores["colour"].high == 1.0
    assert scores["colour"].low == pytest.approx(scipy.stats.beta.ppf(0.025, 40, 1))
    scores = score_seen(specs, [seen()] * 40)
    assert scores["shape"].low == 0.0
    assert scores["shape"].high == pytest.approx(scipy.stats.beta.ppf(0.975, 1, 40))


def test_images_are_read_and_scored():
    image = np.full((64, 64, 3), 245, dtype=np.uint8)
    image[20:55, 8:43] = (220, 40, 40)
    scores = score_images([asked("red square large"), asked("blue square small")], [image, image])
    assert scores["colour"].right == 1 and scores["shape"].right == 2 and scores["everything"].right == 1
    with pytest.raises(ValueError, match="2 specs and 1 images"):
        score_images([asked("red square large")] * 2, [image])
