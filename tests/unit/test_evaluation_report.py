"""Report, table and chart of an evaluation made by hand."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdm_lightning.evaluation.findings import (
    Curve,
    Evaluation,
    Failed,
    Found,
    Gallery,
    Group,
    LeftOut,
    Measure,
    rounded,
)
from hdm_lightning.evaluation.report import chart, report_page, result_table, write_tensorboard
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.metrics.bootstrap import Estimate


def evaluation(**changes):
    def found(value, *, extra=False):
        estimates = tuple(Estimate(value + k, value + k - 0.1, value + k + 0.2, 7) for k in range(3))
        names = ["loss", "only_ema"] if extra else ["loss"]
        return Found(
            [Measure(name, estimates[0], "lower", "nats", "What it & is.", 0.5) for name in names],
            [Curve("by time", "t", "loss", (0.1, 0.5, 0.9), estimates)],
            [Gallery("Images", (Group('<script>alert("x")</script>', {"drawn": gray(8, 12)}),))],
            {"samples": 7},
        )

    settings = {"seed": 3, "bootstrap": {"confidence": 0.9}, "sampling": SamplingSettings(steps=17).to_json()}
    whole = Evaluation(
        {"name": "toy <model>"},
        settings,
        {"ema": {"loss": found(1.0, extra=True)}, "raw": {"loss": found(2.0)}},
        {"loss": "Flow <loss>"},
        [LeftOut("shapes", "no shapes", "build some")],
        [Failed("camera", "ema", "the lens <fell> off", "Traceback")],
        12.34,
        "2031-05-04T03:02:01+00:00",
        "hdm-evaluate 'runs/toy & co'",
    )
    return replace(whole, **changes)


def gray(height, width):
    return np.full((height, width, 3), 200, np.uint8)


def test_numbers_are_rounded_to_a_digit_below_their_interval():
    assert rounded(Estimate(0.123456, 0.1, 0.15, 3)) == ("0.123", "0.100 … 0.150")
    assert rounded(Estimate(1234.5, 1000, 1400, 3)) == ("1234", "1000 … 1400")
    assert rounded(Estimate(0.5, 0.5, 0.5, 3)) == ("0.5", "0.5 … 0.5")


@pytest.mark.parametrize(("written", "step"), [(64, 64), (None, 0), ("many", 0), ([64], 0)])
def test_a_record_of_samples_that_is_no_number_does_not_end_an_evaluation(tmp_path, written, step):
    write_tensorboard(evaluation(subject={"name": "toy", "samples_seen": written}), tmp_path)
    (value,) = EventAccumulator(str(tmp_path / "raw")).Reload().Scalars("evaluation/loss/loss")
    assert (value.step, value.value) == (step, 2.0)


def test_json_holds_every_number():
    found = json.loads(json.dumps(evaluation().to_json()))
    assert found["format"] == "hdm-lightning evaluation 1"
    measure = found["results"]["raw"]["loss"]["measures"]["loss"]
    assert (measure["value"], measure["low"], measure["high"], measure["samples"]) == (2.0, 1.9, 2.2, 7)
    assert (measure["unit"], measure["chance"], measure["better"]) == ("nats", 0.5, "lower")
    (curve,) = found["results"]["ema"]["loss"]["curves"]
    assert curve["points"][2]["value"] == 3.0 and set(curve) == {"title", "x_label", "y_label", "x", "points"}
    assert found["left_out"] == [{"part": "shapes", "why": "no shapes", "hint": "build some"}]
    assert found["failed"][0]["traceback"] == "Traceback"
    assert (found["date"], found["command"]) == ("2031-05-04T03:02:01+00:00", "hdm-evaluate 'runs/toy & co'")


def test_the_page_escapes_what_it_shows_and_says_what_is_missing():
    page = report_page(evaluation())
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "toy &lt;model&gt;" in page
    assert "contains the true value in 90% of such evaluations" in page
    assert "the open end is the exact bound of a proportion" in page
    explained = page.partition("How to read the numbers")[2]
    assert "Wilson" in explained and "Newcombe" in explained and "floor" in explained
    assert page.count("data:image/png;base64,") == 2
    assert re.search(r"shapes</b>: no shapes <i>build some</i>", page)
    assert page.count("<td>–</td>") == 1  # only_ema has no value for raw
    assert "camera (ema)</b>: the lens &lt;fell&gt; off" in page


def test_what_was_drawn_how_when_and_by_which_command_stands_before_the_numbers():
    head = report_page(evaluation()).partition("<main>")[0]
    for text in ("17 steps", "guidance 3", "256×256 px", "2031-05-04", "hdm-evaluate &#39;runs/toy &amp; co&#39;"):
        assert text in head


def sizes_of(page):
    return [tuple(map(int, pair)) for pair in re.findall(r'<img src="[^"]+" width="(\d+)" height="(\d+)"', page)]


def test_images_of_a_group_are_shown_on_one_scale_and_in_their_own_width():
    sides = {"square": gray(32, 32), "wide": gray(16, 64), "tall": gray(64, 16)}
    gallery = Gallery("Sizes", (Group("a long caption " * 20, sides),))
    page = report_page(evaluation(results={"ema": {"aspect": Found(galleries=[gallery])}}))
    assert sizes_of(page) == [(64, 64), (128, 32), (32, 128)]  # all twice as large
    assert f'<figure style="width: {64 + 128 + 32 + 2 * 6}px">' in page  # which the caption does not widen


def test_large_images_are_reduced_together():
    group = Group("", {"large": gray(640, 320), "small": gray(160, 320)})
    page = report_page(evaluation(results={"ema": {"aspect": Found(galleries=[Gallery("g", (group,))])}}))
    assert sizes_of(page) == [(160, 320), (160, 80)]
    wide = Gallery("g", (group,), largest_px=1000)
    page = report_page(evaluation(results={"ema": {"aspect": Found(galleries=[wide])}}))
    assert sizes_of(page) == [(320, 640), (320, 160)]


def test_the_table_has_a_row_a_measure_and_columns_for_both_weights():
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result_table(evaluation()))
    text = console.export_text()
    (row,) = [line for line in text.splitlines() if " loss " in line and "Flow" not in line]
    assert "1.00" in row
    assert "2.00" in row
    assert "1.90 … 2.20" in row
    assert "7" in row


def test_the_chart_places_points_by_their_values():
    parts = {weights: found.curves[0] for weights, found in evaluation().of("loss").items()}
    drawing = chart(parts)
    assert drawing.count("<circle") == 6
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing)]
    assert places[0][0] < places[1][0] < places[2][0]
    assert places[0][1] > places[1][1] > places[2][1]
    assert places[0][1] > places[3][1]  # 1 lies below 2
    assert abs(places[1][1] - places[3][1]) < 0.11  # both are 2


def test_the_chart_s_scale_has_round_numbers():
    parts = {weights: found.curves[0] for weights, found in evaluation().of("loss").items()}
    marks = [float(mark) for mark in re.findall(r'text-anchor="end">([^<]+)<', chart(parts))]
    assert marks == [1, 2, 3, 4]  # of 0.9 to 4.2 with some room
    places = [float(y) for y in re.findall(r'class="grid"[^>]* y1="([\d.]+)"', chart(parts))]
    assert places == sorted(places, reverse=True) and len(places) == len(marks)


def test_numbers_of_the_record_are_short():
    found = Found(record={"samples": 7, "shares": [0.025832766804592122, 0.5]})
    assert "samples: 7; shares: 0.02583, 0.5</p>" in report_page(evaluation(results={"ema": {"loss": found}}))
