"""Figures of the README come from the recorded forecasts, and these from the code of now."""

import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from hdm_lightning.cli.hydra_app import short_name
from hdm_lightning.cli.plan_schedule import run_plan
from hdm_lightning.training.recorded import recorded_values

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "experiments" / "plans"
OF_THE_EVENING = ["dataset.images=1000", "dataset.image_kb=8", "dataset.image_mpx=0.1"]
PRESETS = {
    "evening": ["experiment=evening_gpu", *OF_THE_EVENING],
    "weekend": ["experiment=weekend_24gb"],
    "paper": [],
}


def recorded(preset):
    """Sums of the recorded forecasts, and whether all stages fit as they stand, by machine."""
    plans = json.loads((PLANS / f"cards_{preset}.json").read_text())["plans"]
    return {
        f"{plan['machine']['count']}x{plan['machine']['gpu']['name']}": {
            **plan["total"],
            "fits": all(stage["fits"] for stage in plan["stages"]),
        }
        for plan in plans
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recorded_forecast_is_that_of_the_preset_as_it_stands(preset):
    machines = recorded(preset)
    OmegaConf.register_new_resolver("hdm.short", short_name, replace=True)
    with initialize_config_module("hdm_lightning.conf", version_base="1.3"):
        config = compose("plan", overrides=[f"gpus=[{','.join(machines)}]", *PRESETS[preset]])
    plans = run_plan(recorded_values(config)).content["plans"]
    assert [plan["total"]["hours"] for plan in plans] == pytest.approx([each["hours"] for each in machines.values()])


def test_the_readme_s_costs_are_the_recorded_ones():
    rows = re.findall(r"^\| (\d+x\w+) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    found = {machine: [cell.strip() for cell in cells.split("|")][1:4] for machine, cells in rows}
    assert set(found) == set(recorded("paper"))
    hours = {"min": 1 / 60, "h": 1, "days": 24}
    for machine, cells in found.items():
        for preset, cell in zip(PRESETS, cells, strict=True):
            told = re.fullmatch(r"([\d,]+) (min|h|days), \$([\d,.]+)( \\\*)?", cell)
            if told is None:
                assert cell == "" and machine not in recorded(preset)
                continue
            time, rent = (float(told[part].replace(",", "")) for part in (1, 3))
            sums = recorded(preset)[machine]
            assert time == pytest.approx(sums["hours"] / hours[told[2]], abs=0.5)
            assert (told[4] is None) == sums["fits"]
            assert rent == pytest.approx(sums["rent_usd"]["expected"], abs=0.5 if rent >= 1 else 0.005)


def test_the_readme_s_demo_is_the_recorded_one():
    scores = json.loads((ROOT / "experiments" / "demo" / "pairs" / "demo.json").read_text())["scores"]
    names = {
        "color and shape": ("one", "colour_and_shape"),
        "placed": ("two", "placement"),
        "two": ("two", "everything"),
    }
    for page in (ROOT / "README.md", ROOT / "experiments" / "demo" / "README.md"):
        text = page.read_text()
        rows = re.findall(
            r"^\| (one|two|everything)([^|]*) \| (\d+ of \d+) \| (\d+ of \d+) \| (\d+)% \| (\d+ of \d+) \|$", text, re.M
        )
        assert len(rows) == 3
        for (_, _, *cells), (objects, name) in zip(rows, names.values(), strict=True):
            of = {split: scores[objects][split][name] for split in ("unseen", "seen", "untrained")}
            told = [f"{each['right']} of {each['trials']}" for each in of.values()]
            assert [cells[0], cells[1], cells[3]] == told
            assert int(cells[2]) == round(100 * of["unseen"]["chance"])
