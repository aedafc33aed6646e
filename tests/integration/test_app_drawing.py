"""What the page draws: the pixels and records of hdm-sample, models side by side, settings out of a picture."""

import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hdm_lightning.app.app_settings import AppSettings
from hdm_lightning.app.side_by_side import (
    LAST_WEIGHTS,
    LoadedModels,
    Studio,
    Wanted,
    seed_from,
    settings_from_fields,
)
from hdm_lightning.cli import sample
from hdm_lightning.errors import UserError
from hdm_lightning.generation.image_files import read_record, to_pil, write_png
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.generation.sampling_settings import DrawingMachine
from shown_run import SAMPLING, write_run

CAMERA = {"x_shift": 0.25, "zoom": 1.1, "guidance_scale": 2.5, "routing_scale": 1.5, "steps": 2, "solver": "heun"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_text_encoder, tiny_autoencoder):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("one", "two")):
        write_run(folder / name, tiny_text_encoder, tiny_autoencoder, seed=seed)
    return folder


@pytest.fixture
def studio(runs, tmp_path):
    settings = AppSettings(runs=(runs,), out=tmp_path / "drawn")
    return Studio(settings, DrawingMachine(), torch.device("cpu"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def drawn(studio, wanted, notes=None):
    steps = list(studio.draw(wanted, warn=(notes if notes is not None else []).append, progress=lambda *_: None))
    return steps[-1]


def test_both_weights_of_every_run_can_be_chosen(studio, runs):
    one, two = str(runs / "one"), str(runs / "two")
    assert list(studio.models()) == [one, one + LAST_WEIGHTS, two, two + LAST_WEIGHTS]
    assert {key: studio.settings_of(one)[key] for key in SAMPLING} == SAMPLING


def test_pixels_and_records_are_those_of_the_command(studio, runs, tmp_path):
    model = str(runs / "one")
    wanted = Wanted("a red circle", [model], 48, 32, seed=5, count=3, settings={**CAMERA, "negative_prompt": "dark"})
    ours = drawn(studio, wanted)
    command = [model, "a red circle", "--size", "48x32", "--seed", "5", "--count", "3", "--steps", "2"]
    command += ["--solver", "heun", "--x-shift", "0.25", "--zoom", "1.1", "--guidance", "2.5"]
    command += ["--routing-guidance", "1.5"]
    assert (
        sample.main([*command, "--negative-prompt", "dark", "--device", "cpu", "--out", str(tmp_path / "theirs")]) == 0
    )
    theirs = sorted((tmp_path / "theirs").glob("0*.png"))
    assert [each.path.name for each in ours] == [path.name for path in theirs]
    assert [each.seed for each in ours] == [5, 6, 7]
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(pixels(one.path), pixels(other))
        assert read_record(one.path) == read_record(other)
    assert sample.main(["--repeat", str(ours[1].path), "--device", "cpu", "--out", str(tmp_path / "again")]) == 0
    (again,) = (tmp_path / "again").glob("*.png")
    # Alone, not in a batch of three: rounding may differ.
    assert np.abs(pixels(again).astype(int) - pixels(theirs[1])).max() <= 1


def test_models_and_averages_stand_side_by_side(studio, runs):
    names = [str(runs / "two"), str(runs / "one"), str(runs / "one") + LAST_WEIGHTS]
    wanted = Wanted("a star", names, 32, 32, seed=1, count=2, settings={"steps": 2})
    steps = list(studio.draw(wanted, warn=print, progress=lambda *_: None))
    assert [len(step) for step in steps] == [2, 4, 6]
    assert [(each.seed, each.model) for each in steps[-1]] == [(seed, name) for seed in (1, 2) for name in names]
    assert len({pixels(each.path).tobytes() for each in steps[-1]}) == 6
    alone = drawn(studio, replace(wanted, models=names[2:]))
    assert np.array_equal(pixels(alone[1].path), pixels(steps[-1][5].path))
    assert len(studio.loaded) == 2


def test_a_picture_brings_all_of_its_settings(studio, runs, tmp_path):
    model = str(runs / "two") + LAST_WEIGHTS
    settings = {**CAMERA, "guidance_interval": (0.1, 0.8), "on_indivisible": "pad", "negative_prompt": "dark"}
    (first,) = drawn(studio, Wanted("a red circle", [model], 44, 30, seed=2**62 + 1, settings=settings))
    wanted, notes = studio.settings_from(first.path)
    assert notes == [] and (wanted.models, wanted.seed, wanted.width, wanted.height) == ([model], 2**62 + 1, 44, 30)
    (again,) = drawn(studio, wanted)
    assert again.path != first.path and np.array_equal(pixels(again.path), pixels(first.path))
    assert read_record(again.path) == read_record(first.path)


def test_a_picture_of_elsewhere_opens_nothing(studio, runs, tmp_path):
    (first,) = drawn(studio, Wanted("a star", [str(runs / "one")], 32, 32, settings={"steps": 1}))
    record = replace(
        read_record(first.path),
        model="/etc/passwd",
        image="/etc/shadow",
        loras=({"name": "/etc/hosts", "weight": 0.5},),
    )
    write_png(tmp_path / "foreign.png", torch.zeros(3, 8, 8, dtype=torch.uint8), record)
    wanted, notes = studio.settings_from(tmp_path / "foreign.png")
    assert wanted.models == [] and wanted.loras == [] and len(notes) == 3
    with pytest.raises(UserError, match="contains no settings"):
        to_pil(torch.zeros(3, 8, 8, dtype=torch.uint8)).save(tmp_path / "plain.png")
        studio.settings_from(tmp_path / "plain.png")


def test_other_weights_than_a_picture_s_are_told(studio, runs, tmp_path):
    (first,) = drawn(studio, Wanted("a star", [str(runs / "one")], 32, 32, settings={"steps": 1}))
    write_png(
        tmp_path / "a.png", torch.zeros(3, 8, 8, dtype=torch.uint8), replace(read_record(first.path), fingerprint="0")
    )
    assert "have changed since" in studio.settings_from(tmp_path / "a.png")[1][0]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"models": ["../one"]}, "models"),
        ({"models": ["/etc/passwd"]}, "models"),
        ({"models": []}, "models"),
        ({"loras": [("/etc/passwd", 1.0)]}, "LoRAs"),
        ({"count": 0}, "images"),
        ({"count": 257}, "images"),
        ({"width": 33}, "--size"),
        ({"settings": {"zoom": 0.0}}, "settings"),
    ],
)
def test_what_cannot_be_drawn_is_refused(studio, runs, change, where):
    with pytest.raises(UserError) as error:
        drawn(studio, replace(Wanted("a star", [str(runs / "one")], 32, 32), **change))
    assert error.value.where == where and not list(studio.settings.out.glob("*.png"))


def test_a_cut_prompt_is_told(studio, runs):
    notes = []
    drawn(studio, Wanted("a red star " * 20, [str(runs / "one")], 32, 32, settings={"steps": 1}), notes)
    assert re.search(r"the last \d+ are cut", notes[0])


def test_models_stay_in_memory_and_the_one_unused_for_longest_goes(runs):
    read = []

    def load(path, options):
        read.append(path.name)
        return load_pipeline(path, options)

    models, options = LoadedModels(2, load), LoadOptions()
    for name in ("one", "two", "one"):
        models.load(runs / name, options)
    assert read == ["one", "two"] and len(models) == 2
    models.load(runs / "one", replace(options, weights="raw"))  # in place of two
    models.load(runs / "one", options)
    assert read == ["one", "two", "one"] and len(models) == 2
    weights = models.load(runs / "one", options).weight_files[0]
    os.utime(weights, ns=(1, 1))
    models.load(runs / "one", options)
    assert read == ["one", "two", "one", "one"]


@pytest.mark.parametrize("text", ["", "-1", "1.5", "٣", "9" * 19, "0x10", "1" * 400])
def test_seeds_that_are_none(text):
    with pytest.raises(UserError, match="seed"):
        seed_from(text)
    assert seed_from(" 9223372036854775807 ") == 2**63 - 1


@pytest.mark.parametrize("value", [None, "3", True, [1]])
def test_numbers_that_are_none(value):
    with pytest.raises(UserError, match="is not a number"):
        settings_from_fields({"zoom": value})
    with pytest.raises(UserError, match="is not a whole number"):
        settings_from_fields({"steps": 2.5})
