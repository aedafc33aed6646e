"""hdm-evaluate on scenes of shapes: unseen beside seen, by the rule of the set's own records."""

import json

import pytest
import torch

from hdm_lightning.cli import evaluate
from hdm_lightning.datasets.shapes import build_shapes, scene_prompts
from hdm_lightning.models import XUT
from toy_run import CONFIG, write_final

SMALL = ["--parts", "shapes", "--weights", "ema", "--shapes-prompts", "8", "--shapes-pairs", "4"]


@pytest.fixture(scope="module")
def evaluated_model(tmp_path_factory, tiny_text_encoder, tiny_autoencoder):
    """Folder of an untrained network."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained")
    sampling = {"height": 32, "width": 32, "steps": 1, "guidance_scale": 1.0}
    state = XUT(CONFIG).state_dict()
    write_final(folder / "final", tiny_text_encoder, tiny_autoencoder, state, sampling=sampling)
    return folder


@pytest.fixture(scope="module")
def evaluated(evaluated_model, tmp_path_factory):
    """By the rule of the reference set, what the part found."""
    folder, found = tmp_path_factory.mktemp("shapes"), {}
    for rule in ("pairs", "triples"):
        shards = build_shapes(folder / rule, count=6, resolution=32, split="heldout", held_out=rule)
        arguments = [str(evaluated_model), "--data", str(shards), *SMALL, "--out", str(folder / f"{rule}_found")]
        assert evaluate.main(arguments) == 0
        result = json.loads((folder / f"{rule}_found" / "evaluation.json").read_text())
        found[rule] = result["results"]["ema"]["shapes"]
    return found


def test_unseen_prompts_are_those_that_the_set_never_shows(evaluated):
    for rule, part in evaluated.items():
        assert part["record"]["held_out"] == rule
        units = {tuple(unit) for unit in part["outcomes"]["one_unseen_colour"]["units"]}
        specs = [prompt.spec["objects"][0] for prompt in scene_prompts(8, split="heldout", rule=rule)]
        parts = ("colour", "shape") if rule == "pairs" else ("colour", "shape", "size")
        assert units == {(" ".join(spec[part] for part in parts),) for spec in specs}
        seen = {tuple(unit) for unit in part["outcomes"]["one_seen_colour"]["units"]}
        assert not seen & units


@pytest.mark.slow
def test_caption_ranks_stand_beside_their_control_or_are_withheld(evaluated_model, tmp_path):
    train = build_shapes(tmp_path / "train", count=520, resolution=32)
    reference = build_shapes(tmp_path / "reference", count=80, resolution=32, seed=1)
    data = ["--data", str(reference), "--train-data", str(train), "--train-samples", "520", "--samples", "80"]
    arguments = [str(evaluated_model), *data, "--weights", "ema", "--parts", "agreement,copies", "--resamples", "100"]
    assert evaluate.main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["results"]["ema"]
    part = found["agreement"]
    ranks = part["measures"]
    above = {kind: ranks[f"caption_rank_of_{kind}"]["value"] - 0.5 for kind in ("real", "decoded")}
    holds = above["decoded"] >= 0.8 * above["real"] and ranks["caption_rank_of_decoded"]["low"] > 0.5
    assert ("caption_rank" in ranks) == holds != ("caption_rank_withheld" in part["record"])
    assert found["copies"]["measures"]["found_planted_features"]["samples"] == 200


def test_the_gap_is_the_difference_and_the_bound_relation_comes_first(evaluated):
    measures = evaluated["pairs"]["measures"]
    of_two = [name for name in measures if name.startswith("two_")]
    assert of_two[:4] == [f"two_{kind}_relation_bound" for kind in ("unseen", "seen", "gap", "decoded")]
    for name in ("one_{}_colour_and_shape", "two_{}_placement", "two_{}_background"):
        seen, unseen, gap = (measures[name.format(kind)] for kind in ("seen", "unseen", "gap"))
        assert gap["value"] == pytest.approx(seen["value"] - unseen["value"])
        assert gap["low"] <= gap["value"] <= gap["high"]
        images = evaluated["pairs"]["outcomes"][name.format("unseen")]
        assert unseen["value"] == pytest.approx(sum(images["values"]) / sum(images["trials"]))
