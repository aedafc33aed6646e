"""The numbers in the tables of the experiments' pages are those of the JSON files beside them."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.coordinate_check.run import exponents
from experiments.plans import table as plans

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NUMBER = r"[−-]?\d[\d,]*(?:\.\d+)?"


def read(name):
    return json.loads((EXPERIMENTS / name).read_text())


def page(name):
    return (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")


def numbers(text):
    """Return the numbers of a text, each with half a unit of its last digit."""
    for found in re.findall(NUMBER, text):
        _, _, decimals = found.partition(".")
        yield float(found.replace(",", "").replace("−", "-")), 0.5 * 10.0 ** -len(decimals)


def assert_rows(name, expected):
    """Check that each row, named by its first cells, has these numbers in the others, to the last digit shown."""
    rows = re.findall(r"^\| (.*) \|$", page(name).replace("**", ""), re.MULTILINE)
    assert expected
    for first, values in expected.items():
        begins = f"{first} | "
        (row,) = [row for row in rows if row.startswith(begins)]
        shown = list(numbers(row.removeprefix(begins)))
        assert [value for value, _ in shown] == [
            pytest.approx(value, abs=half * (1 + 1e-6)) for value, (_, half) in zip(values, shown, strict=True)
        ], first


@pytest.fixture
def scripts(monkeypatch):
    """Scripts of an experiment, which import each other as `python experiments/NAME/SCRIPT.py` lets them."""

    def load(folder, *names):
        with monkeypatch.context() as patched:
            patched.syspath_prepend(str(EXPERIMENTS / folder))
            found = [importlib.import_module(name) for name in names]
        for module in [each for each in sys.modules.values() if getattr(each, "__file__", None)]:
            if Path(module.__file__).parent == EXPERIMENTS / folder:
                del sys.modules[module.__name__]
        return found

    return load


def test_generated_tables_are_those_of_the_records(scripts):
    assert plans.tables() in page("plans")
    (benchmarks,) = scripts("benchmarks", "table")
    assert benchmarks.tables() in page("benchmarks")


def test_eqvae_openclipart(scripts):
    run, short = scripts("eqvae_openclipart", "run", "short_training")
    results = read("eqvae_openclipart/results.json")
    for part in run.table(results["values"], results["block_means"]).split("\n\n"):
        assert part.strip() in page("eqvae_openclipart")
    assert short.table(read("eqvae_openclipart/short_training.json")["values"]) in page("eqvae_openclipart")


def test_coordinate_check():
    recorded = read("coordinate_check/results.json")["scales"].values()
    scales = [{name: {int(width): runs[width] for width in runs} for name, runs in each.items()} for each in recorded]
    found = [exponents(each) for each in scales]
    rows = {name: [case[name][kind] for case in found for kind in ("mean", "std")] for name in found[0]}
    assert_rows("coordinate_check", rows)


def test_wiring():
    rows = {}
    for each in read("wiring/results.json")["summary"]:
        wiring = " | ".join(str(each[name]) for name in ("residual", "skips", "text", "rate"))
        kinds = ("mean", "std") if each["seeds"] > 1 else ("mean",)
        loss, right = ([each[name][kind] for kind in kinds] for name in ("loss", "colour_and_shape"))
        rows[wiring] = [*loss, *(100 * value for value in right)]
    assert_rows("wiring", rows)


def test_latent_borders():
    found = read("latent_borders/openclipart_64.json")
    by_distance = found["rms_by_distance"]
    names = {"0 (at the border)": "0 to 0 cells", "1": "1 to 1 cells", "2 to 3": "2 to 3 cells"}
    names |= {"4 to 7": "4 to 7 cells", "8 and more": "8 and more"}
    assert set(names.values()) == set(by_distance)
    rows = {shown: [by_distance[name]] for shown, name in names.items()}
    assert_rows("latent_borders", {**rows, "all": [found["rms_all"]]})
    assert f"differ by {found['decoded_psnr_db']:.1f} dB" in page("latent_borders")


def test_large_index():
    found = read("large_index/result.json")
    names = {
        "samples within the limits": "samples",
        "index and plan, CPU seconds": "cpu_s",
        "peak memory, including mapped pages (GB)": "peak_gb",
        "the process's own memory at the end (GB)": "own_gb",
        "looking up one sample, including its shard's table (ms)": "place_ms",
    }
    crops = ("squares", "buckets")
    assert_rows("large_index", {shown: [found[crop][name] for crop in crops] for shown, name in names.items()})


def test_near_duplicate_search():
    searches = read("near_duplicate_search/result.json")["searches"]
    rows = {
        f"{each['hashes']:,} | {each['bits']}": [each[key] for key in ("copies", "cpu_s", "peak_gb")]
        for each in searches
    }
    robust = read("near_duplicate_search/robustness.json")
    marked = {"a red corner": "a red corner, 12% of each side"}
    for name, within in robust["copies_within_bits"].items():
        rows[marked.get(name, name)] = [100 * count / robust["images"] for count in within.values()]
    assert_rows("near_duplicate_search", rows)
    assert f"the {robust['near_duplicates']} near-duplicates" in page("near_duplicate_search")


def test_data_speed_has_the_last_of_its_runs():
    found = read("data_speed/result.json")["decoding"]
    for each in found:
        (row,) = re.findall(rf"^\| {each['resolution']}².*$", page("data_speed"), re.MULTILINE)
        last = [list(numbers(cell))[-1] for cell in row.split("|")[2:-1]]
        values = [each[key] for key in ("ours", "plain", "bound", "times plain")] + [100 * each["share of bound"]]
        for value, (shown, half) in zip(values, last, strict=True):
            assert shown == pytest.approx(value, abs=half)


def test_broad_data():
    parts = read("broad_data/result.json")
    counted = parts["counted"]["found"]["numbers"]
    status, faults, kept = counted["rows_by_status"], counted["faults"], counted["kept"]
    rows = {
        "addresses with a row; successful downloads": [counted["rows"], status["success"]],
        "failed downloads; no usable image": [status["failed_to_download"], status["failed_to_resize"]],
        "samples in archives": [counted["samples"]],
        "of these, HTML pages; last sample of the cut archive": [faults["no image"], faults["last of a cut archive"]],
        "truncated images; empty alt texts": [faults["half an image"], faults["no text"]],
        "good": [counted["good"]],
        "with `aesthetic_score_laion_v2` ≥ 4.5, `watermark_score` ≤ 0.5": [kept["by_scores"]],
        "of these, with short side ≥ 32 px, three words, aspect ≤ 3": [kept["by_both"]],
        "of these, large enough for 64 px at `max_upscale: 1.5`": [kept["of_them_large_enough_for_64px"]],
    }
    assert_rows("broad_data", {name: values * 2 for name, values in rows.items()})
    prepared = {each["command"].split()[1]: each for each in parts["prepared"]["found"]}
    assert prepared["verify"]["samples"] == counted["good"] and prepared["filter"]["samples"] == kept["by_both"]
    assert set(parts["compared"].values()) == {True}


def test_challenge():
    scores = read("challenge/leaderboard.json")["entries"][0]["scores"]

    def of(score):
        return [100 * score[key] for key in ("value", "low", "high")]

    kinds = {
        "one object: color and shape": ("one", "colour_and_shape"),
        "one object: everything": ("one", "everything"),
        "two objects: placed correctly relative to each other": ("two", "placement"),
        "two objects: everything": ("two", "everything"),
    }
    rows = {
        shown: [*of(scores[f"unseen {objects}"][name]), *of(scores[f"seen {objects}"][name])]
        for shown, (objects, name) in kinds.items()
    }
    assert_rows("challenge", {**rows, "the score: everything, one and two objects": of(scores["headline"])})


def measured(name):
    return {
        key: each
        for part in read(f"{name}/evaluation.json")["results"]["ema"].values()
        for key, each in part["measures"].items()
    }


def of_measures(found, *names, unit=1.0, interval=True, samples=True):
    """Return the values, the interval from the lowest to the highest end, and the count of a row of measures."""
    each = [found[name] for name in names]
    values = [unit * one["value"] for one in each]
    ends = [unit * min(one["low"] for one in each), unit * max(one["high"] for one in each)] if interval else []
    return [*values, *ends, *([each[0]["samples"]] if samples else [])]


def test_openclipart_cpu():
    found = measured("openclipart_cpu")
    assert_rows(
        "openclipart_cpu",
        {
            "flow loss, unseen drawings": of_measures(found, "flow_loss"),
            "flow loss, training drawings": of_measures(found, "flow_loss_of_training"),
            "kernel distance": of_measures(found, "kernel_efficientnet_lite0"),
            "kernel distance due to the autoencoder alone": of_measures(
                found, "kernel_efficientnet_lite0_of_autoencoder"
            ),
            "the same for real drawings, not through the autoencoder": of_measures(found, "caption_rank_of_real"),
            "images nearer to training drawings than unseen drawings are, by pixels (5% is expected)": of_measures(
                found, "closer_pixels", unit=100
            ),
            "the same by features, without power (see the demo's page)": of_measures(
                found, "closer_features", unit=100
            ),
        },
    )


def test_demo_measured_further():
    found = measured("demo")
    both = ("x_shift_response", "x_shift_back_response"), ("y_shift_response", "y_shift_back_response")
    ends = [end for names in both for name in names for end in (found[name]["low"], found[name]["high"])]
    values = [[found[name]["value"] for name in names] for names in both]
    assert_rows(
        "demo",
        {
            "flow loss, held-out scenes": of_measures(found, "flow_loss"),
            "flow loss, training scenes": of_measures(found, "flow_loss_of_training"),
            "kernel distance": of_measures(found, "kernel_efficientnet_lite0"),
            "of it, by the autoencoder alone": of_measures(found, "kernel_efficientnet_lite0_of_autoencoder"),
            "Fréchet distance": of_measures(found, "frechet_efficientnet_lite0"),
            "the same between real scenes and themselves (floor)": of_measures(
                found, "frechet_efficientnet_lite0_floor"
            ),
            "precision, recall, coverage of real scenes": of_measures(
                found, "precision_of_real", "recall_of_real", "coverage_of_real", unit=100
            ),
            "diversity across prompts (1 is that of real scenes)": of_measures(found, "across_prompts"),
            "rank of the right caption by the agreement head (0.5 is chance; real scenes 0.92)": of_measures(
                found, "caption_rank"
            ),
            "camera shifted to the right, then the left: response (1 is exact)": [*values[0], *ends[:4], 48],
            "camera shifted down, then up": [*values[1], *ends[4:], 48],
            "camera zoomed (unrelated images have about 0.5, not 0)": of_measures(found, "zoom_response"),
            "nearer to training than held-out scenes are, by pixels (5% is expected)": of_measures(
                found, "closer_pixels", unit=100
            ),
            "planted copies that the search finds, by pixels": of_measures(found, "found_planted_pixels", unit=100),
        },
    )
