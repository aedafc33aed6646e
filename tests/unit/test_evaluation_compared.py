"""Two evaluations compared image by image, and several trainings summed up, from files as the commands write them."""

import json

import numpy as np
import pytest
import scipy.stats

from hdm_lightning.cli import evaluate
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.model_comparison import compare_models, summarise_trainings
from hdm_lightning.evaluation.recorded_numbers import read_recorded

SHARE, LOSS = "shapes.one_unseen_colour_and_shape", "loss.flow_loss"
UNITS = [[f"unit {number // 4}"] for number in range(48)]


def written(folder, right, loss, seed=0, order="abc", units=UNITS):
    """An evaluation.json of prompts of twelve combinations, and of a loss."""
    folder.mkdir()
    share = {"value": float(np.mean(right)), "better": "higher", "samples": 48, "method": "Wilson score over 12"}
    mean = {"value": float(np.mean(loss)), "better": "lower", "samples": len(loss), "method": "percentile bootstrap"}
    name = "one_unseen_colour_and_shape"
    shapes = {
        "record": {"held_out": "pairs"},
        "measures": {name: share},
        "outcomes": {name: {"values": list(map(float, right)), "trials": [1] * 48, "units": units}},
    }
    flow = {"record": {}, "measures": {"flow_loss": mean}, "outcomes": {"flow_loss": {"values": list(loss)}}}
    settings = {"seed": seed, "data": {"reference": {"order": order, "resolution": 64}}}
    content = {
        "format": "hdm-lightning evaluation 1",
        "settings": settings,
        "results": {"ema": {"shapes": shapes, "loss": flow}},
    }
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def models(tmp_path, **second):
    random = np.random.default_rng(0)
    loss = random.normal(1.0, 0.3, 60)
    right = np.repeat([1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0], 4)
    better = np.repeat([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], 4)
    first = written(tmp_path / "first", right, loss)
    other = written(tmp_path / "second", better, loss + random.normal(0.0, 0.001, 60), **second)
    return first, other


def test_the_unit_is_the_combination_and_sameness_is_said_where_it_is_shown(tmp_path):
    first, second = map(read_recorded, models(tmp_path))
    rows = {row.name: row for row in compare_models(first, second).measures}
    shares, loss = rows["shapes.one_unseen_colour_and_shape"], rows["loss.flow_loss"]
    assert (shares.first, shares.second) == (pytest.approx(8 / 12), pytest.approx(11 / 12))
    by_unit = scipy.stats.ttest_1samp([0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0], 0.0)
    assert shares.difference.p == pytest.approx(by_unit.pvalue) and shares.difference.units == 12
    assert shares.adjusted_p == pytest.approx(min(1, 2 * by_unit.pvalue))  # of two that were named beforehand
    assert shares.verdict == "not told apart" and loss.verdict == "the same"
    assert all(row.primary for row in rows.values())
    alone = compare_models(first, second, primary=["shapes.one_unseen_colour_and_shape"], confidence=0.9).measures[0]
    assert alone.verdict == "better" and alone.adjusted_p == pytest.approx(by_unit.pvalue)


def test_images_of_other_seeds_or_other_reference_images_are_not_paired(tmp_path):
    first, second = map(read_recorded, models(tmp_path, order="other"))
    found = compare_models(first, second)
    assert [row.name for row in found.measures] == ["shapes.one_unseen_colour_and_shape"]
    assert found.apart == {"loss": "not of the same reference images"}
    (tmp_path / "seeds").mkdir()
    other_seed = read_recorded(models(tmp_path / "seeds", seed=1)[1])
    with pytest.raises(UserError, match=r"nothing can be compared.*not of the same seed"):
        compare_models(first, other_seed)
    with pytest.raises(UserError, match=r"camera\.zoom is not measured"):
        compare_models(first, second, primary=["camera.zoom"])


def test_a_measure_of_one_combination_is_left_out_and_said(tmp_path, capsys):
    random, one = np.random.default_rng(1), [["small red star"]] * 48
    right, loss = random.integers(0, 2, 48), random.normal(1, 0.1, 20)
    paths = [written(tmp_path / name, right, loss, units=one) for name in ("first", "second")]
    first, second = map(read_recorded, paths)
    found = compare_models(first, second)
    assert [row.name for row in found.measures] == [LOSS]
    assert found.apart == {SHARE: "images of one combination alone"}
    with pytest.raises(UserError, match="one combination alone") as caught:
        compare_models(first, second, primary=[SHARE])
    assert caught.value.where == "--primary" and LOSS in caught.value.hint
    assert evaluate.main(["compare", *map(str, paths)]) == 0
    assert f"not compared: {SHARE}: images of one combination alone" in capsys.readouterr().out


def test_evaluations_of_one_image_are_refused_with_what_to_do(tmp_path):
    paths = [written(tmp_path / name, [1] * 48, [0.5], units=[["a"]] * 48) for name in ("first", "second")]
    with pytest.raises(UserError, match=r"flow_loss: one image alone") as caught:
        compare_models(*map(read_recorded, paths))
    assert caught.value.where == str(paths[1] / "evaluation.json")
    assert "two combinations or more" in caught.value.hint


def test_two_flawless_models_are_the_same_only_where_so_many_combinations_show_it(tmp_path):
    verdicts = []
    for name, units in (("few", UNITS), ("many", [[f"unit {number}"] for number in range(48)])):
        (tmp_path / name).mkdir()
        paths = [written(tmp_path / name / each, [1] * 48, [0.5, 0.6], units=units) for each in ("first", "second")]
        row = compare_models(*map(read_recorded, paths), margin=0.1).measures[0]
        verdicts.append((row.name, row.verdict))
    assert verdicts == [(SHARE, "not told apart"), (SHARE, "the same")]


def test_the_command_compares_and_writes(tmp_path, capsys):
    first, second = models(tmp_path)
    assert evaluate.main(["compare", str(first), str(second), "--out", str(tmp_path / "c.json")]) == 0
    kept = json.loads((tmp_path / "c.json").read_text())
    verdicts = {row["name"]: row["verdict"] for row in kept["measures"]}
    assert verdicts == {"shapes.one_unseen_colour_and_shape": "not told apart", "loss.flow_loss": "the same"}
    assert evaluate.main(["compare", str(first), str(tmp_path)]) == 2
    for content in ("{}", "[" * 100_000):
        (tmp_path / "evaluation.json").write_text(content)
        assert evaluate.main(["compare", str(first), str(tmp_path)]) == 2
        assert "is not a readable evaluation" in capsys.readouterr().err


def demo(path, right, placed):
    """A demo.json of one criterion of one object and one of two."""
    scores, outcomes = {}, {}
    for prefix, criterion, hits, count in (("one", "colour_and_shape", right, 128), ("two", "placement", placed, 48)):
        score = {"share": hits / count, "right": hits, "trials": count, "low": 0.0, "high": 1.0}
        images = {"right": {criterion: [1] * hits + [0] * (count - hits)}, "trials": {criterion: [1] * count}}
        scores[prefix] = {"unseen": {criterion: score}}
        outcomes[prefix] = {"unseen": {**images, "units": [["a"]] * count}}
    content = {"format": "hdm-lightning demo 2", "held_out": "pairs", "scores": scores, "outcomes": outcomes}
    path.write_text(json.dumps(content))
    return path


def test_trainings_are_summed_up_over_trainings(tmp_path, capsys):
    runs = [
        demo(tmp_path / f"{n}.json", hits, placed) for n, (hits, placed) in enumerate([(122, 48), (116, 41), (119, 45)])
    ]
    found = summarise_trainings([read_recorded(path) for path in runs])
    one = found["shapes.one_unseen_colour_and_shape"]
    logits = np.log((np.array([122, 116, 119]) + 0.5) / (128 - np.array([122, 116, 119]) + 0.5))
    reach = scipy.stats.t.ppf(0.975, 2) * logits.std(ddof=1) * (1 + 1 / 3) ** 0.5
    assert one.logit_centre == pytest.approx(1 / (1 + np.exp(-logits.mean())))
    shrunk = 1 / (1 + np.exp(-(logits.mean() - reach)))
    assert one.next_low == pytest.approx((129 * shrunk - 0.5) / 128)  # of the share as it is observed
    assert (one.least, one.most, one.trainings) == (116 / 128, 122 / 128, 3)
    assert found["shapes.two_unseen_placement"].next_low < 41 / 48
    assert evaluate.main(["trainings", *map(str, runs), "--out", str(tmp_path / "t.json")]) == 0
    kept = json.loads((tmp_path / "t.json").read_text())["measures"]["shapes.one_unseen_colour_and_shape"]
    assert kept["logit_centre"] == one.logit_centre and kept["low"] < one.logit_centre < kept["high"]
    assert "3 training runs: the last column is wide" in capsys.readouterr().out
    assert evaluate.main(["trainings", str(runs[0])]) == 2
    assert "says nothing about another" in capsys.readouterr().err


def test_the_count_command_knows_what_it_takes(capsys):
    assert evaluate.main(["count", "0.95", "0.9", "--design-effect", "5"]) == 0
    assert int(capsys.readouterr().out.split()[0]) == pytest.approx(5 * 435, abs=5)
    assert evaluate.main(["count", "0.95", "--prompts", "435"]) == 0
    assert "at least 0.05 away" in capsys.readouterr().out
    assert evaluate.main(["count", "0.9"]) == 2
    assert evaluate.main(["count", "0.9", "0.9"]) == 2
    assert evaluate.main(["count", "1.9", "0.9"]) == 2
