"""Forecast error of a stage whose hours do not set the utilization: python experiments/plans/left_out.py."""

import json
from collections.abc import Mapping
from pathlib import Path

from hdm_lightning.profiling.duration import PAPER_HOURS

HERE = Path(__file__).parent


def left_out_errors(forecast_hours: Mapping[int, float], hours: Mapping[int, float]) -> dict[int, float]:
    """Return each stage's relative error at the utilization that minimizes the largest error of the others.

    Args:
        forecast_hours: by resolution, at one utilization, to which they are inversely proportional.
        hours: actual hours of the stages.
    """
    implied = {side: forecast_hours[side] / hours[side] for side in hours}
    errors = {}
    for side, own in implied.items():
        others = [each for other, each in implied.items() if other != side]
        errors[side] = own / ((min(others) + max(others)) / 2) - 1
    return errors


def main() -> None:
    """Print a line per stage, and the range of the total."""
    plan = json.loads((HERE / "paper_4x5090.json").read_text(encoding="utf-8"))
    found = {stage["stage"]["resolution"]: stage["hours"] for stage in plan["stages"]}
    for side, error in left_out_errors(found, PAPER_HOURS).items():
        print(f"{side} px: {error:+.0%}")
    total, implied = sum(found.values()), [found[side] / PAPER_HOURS[side] for side in found]
    print(f"all: {total / max(implied):.0f} to {total / min(implied):.0f} h at what each stage implies for itself")


if __name__ == "__main__":
    main()
