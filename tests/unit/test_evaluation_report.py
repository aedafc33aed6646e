"""Report, table and chart of an evaluation made by hand."""

import json
import re

import numpy as np
from rich.console import Console

from hdm_lightning.evaluation.report_chart import chart
from hdm_lightning.evaluation.report_html import report_page
from hdm_lightning.evaluation.report_table import result_table
from hdm_lightning.evaluation.results import Curve, Evaluation, Gallery, LeftOut, Measure, PartResult, rounded
from hdm_lightning.metrics.bootstrap import Estimate


def evaluation():
    def result(value, *, extra=False):
        estimates = tuple(Estimate(value + k, value + k - 0.1, value + k + 0.2, 7) for k in range(3))
        names = ["loss", "only_ema"] if extra else ["loss"]
        return PartResult(
            "loss",
            "Flow <loss>",
            [Measure(name, estimates[0], "lower", "nats", "What it & is.", 0.5) for name in names],
            [Curve("by time", "t", "loss", (0.1, 0.5, 0.9), estimates)],
            [Gallery("Pictures", (np.full((8, 12, 3), 200, np.uint8),), ('<script>alert("x")</script>',))],
            {"samples": 7},
        )

    results = {"ema": [result(1.0, extra=True)], "raw": [result(2.0)]}
    settings = {"seed": 3, "bootstrap": {"confidence": 0.9}}
    return Evaluation({"name": "toy <model>"}, settings, results, [LeftOut("shapes", "no shapes", "build some")], 12.34)


def test_numbers_are_rounded_to_a_digit_below_their_interval():
    assert rounded(Estimate(0.123456, 0.1, 0.15, 3)) == ("0.123", "0.100 … 0.150")
    assert rounded(Estimate(1234.5, 1000, 1400, 3)) == ("1234", "1000 … 1400")
    assert rounded(Estimate(0.5, 0.5, 0.5, 3)) == ("0.5", "0.5 … 0.5")


def test_json_holds_every_number():
    found = json.loads(json.dumps(evaluation().to_json()))
    assert found["format"] == "hdm-lightning evaluation 1"
    measure = found["results"]["raw"]["loss"]["measures"]["loss"]
    assert (measure["value"], measure["low"], measure["high"], measure["samples"]) == (2.0, 1.9, 2.2, 7)
    assert (measure["unit"], measure["chance"], measure["better"]) == ("nats", 0.5, "lower")
    assert found["results"]["ema"]["loss"]["curves"][0]["points"][2]["value"] == 3.0
    assert found["left_out"] == [{"part": "shapes", "why": "no shapes", "hint": "build some"}]


def test_the_page_escapes_what_it_shows_and_says_what_is_missing():
    page = report_page(evaluation())
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "toy &lt;model&gt;" in page
    assert "holds the true value in 90% of such evaluations" in page
    assert "the open end is the exact bound of a proportion" in page
    assert page.count("data:image/png;base64,") == 2
    assert re.search(r"shapes</b>: no shapes <i>build some</i>", page)
    assert page.count("<td>–</td>") == 1  # only_ema has no value for raw


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
    parts = {weights: one[0].curves[0] for weights, one in evaluation().results.items()}
    drawing = chart(parts)
    assert drawing.count("<circle") == 6
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing)]
    assert places[0][0] < places[1][0] < places[2][0]
    assert places[0][1] > places[1][1] > places[2][1]
    assert places[0][1] > places[3][1]  # 1 lies below 2
    assert abs(places[1][1] - places[3][1]) < 0.11  # both are 2


def test_the_chart_s_scale_has_round_numbers():
    parts = {weights: one[0].curves[0] for weights, one in evaluation().results.items()}
    marks = [float(mark) for mark in re.findall(r'text-anchor="end">([^<]+)<', chart(parts))]
    assert marks == [1, 2, 3, 4]  # of 0.9 to 4.2 with some room
    places = [float(y) for y in re.findall(r'class="grid"[^>]* y1="([\d.]+)"', chart(parts))]
    assert places == sorted(places, reverse=True) and len(places) == len(marks)


def test_numbers_of_the_record_are_short():
    found = evaluation()
    found.results["ema"][0].record["shares"] = [0.025832766804592122, 0.5]
    assert "samples: 7; shares: 0.02583, 0.5</p>" in report_page(found)
