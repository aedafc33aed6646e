"""Figures of the README come from the recorded forecasts, and these from the code of now."""

import json
import re
from pathlib import Path

import pytest

from hdm_lightning.cli.overrides import composed
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
    config = composed("plan", [f"gpus=[{','.join(machines)}]", *PRESETS[preset]])
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
    folder = ROOT / "experiments" / "demo"
    trainings = [json.loads(file.read_text())["scores"] for file in sorted(folder.glob("seed*.json"))]
    assert len(trainings) == 6
    names = [("one", "colour_and_shape"), ("two", "placement"), ("two", "everything")]

    def percent(objects, split, name):
        shares = [100 * each[objects][split][name]["share"] for each in trainings]
        return round(sum(shares) / 6), round(min(shares)), round(max(shares))

    for page in (ROOT / "README.md", folder / "README.md"):
        cell = r"(\d+)% \((\d+) to (\d+)\)"
        rows = re.findall(
            rf"^\| (?:one|two|everything)[^|]* \| {cell} \| {cell} \| (\d+)% \| (\d+)%", page.read_text(), re.M
        )
        assert len(rows) == 3
        for row, (objects, name) in zip(rows, names, strict=True):
            numbers = [int(each) for each in row]
            assert tuple(numbers[:3]) == percent(objects, "unseen", name)
            assert tuple(numbers[3:6]) == percent(objects, "seen", name)
            assert numbers[6] == round(100 * trainings[0][objects]["unseen"][name]["chance"])
            assert numbers[7] == percent(objects, "untrained", name)[0]


def test_the_demo_s_page_has_the_recorded_interval_of_one_further_training():
    folder = ROOT / "experiments" / "demo"
    recorded = json.loads((folder / "trainings.json").read_text())["measures"]
    rows = re.findall(r"\| (\d+)% to (\d+)% \|$", (folder / "README.md").read_text(), re.M)
    names = ("one_unseen_colour_and_shape", "two_unseen_placement", "two_unseen_everything")
    ends = [(recorded[f"shapes.{name}"]["next_low"], recorded[f"shapes.{name}"]["next_high"]) for name in names]
    assert [(int(low), int(high)) for low, high in rows] == [
        (round(100 * low), round(100 * high)) for low, high in ends
    ]
