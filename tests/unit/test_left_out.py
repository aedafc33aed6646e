"""The error of a stage that was left out, against a search for the utilisation."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


def script():
    """experiments/plans/left_out.py as a module."""
    path = Path(__file__).parents[2] / "experiments/plans/left_out.py"
    spec = importlib.util.spec_from_file_location("left_out", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stage_left_out_is_forecast_by_the_others_alone():
    forecast, hours = {1: 80.0, 2: 90.0, 3: 110.0, 4: 130.0}, dict.fromkeys((1, 2, 3, 4), 100.0)
    found = script().left_out_errors(forecast, hours)
    for side in hours:
        others = np.array([forecast[other] / hours[other] for other in hours if other != side])
        factors = np.linspace(0.5, 2.0, 60001)  # of the utilisation
        best = factors[np.abs(others / factors[:, None] - 1).max(1).argmin()]
        assert found[side] == pytest.approx(forecast[side] / hours[side] / best - 1, abs=1e-3)


def test_the_paper_s_stages_left_out_are_further_off_than_the_fitted_ones(capsys):
    module = script()
    module.main()
    said = capsys.readouterr().out
    shown = [int(line.split()[-1].rstrip("%")) for line in said.splitlines()[:4]]
    assert max(map(abs, shown)) > 25  # beyond what the fit itself leaves
