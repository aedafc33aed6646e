"""Activation scale against width after a few steps, under the rules of `training.optimization.learning_rates`.

Writes results.json and figure.png beside this file.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from experiments.coordinate_check.check import CoordinateCheck, width_exponent

Scales = dict[str, dict[int, list[float]]]

HERE = Path(__file__).parent
CASES: dict[str, CoordinateCheck] = {
    "mup, residual input": CoordinateCheck("mup", 0.5, wiring={"residual": "input"}),
    "mup, residual normed": CoordinateCheck("mup", 0.5, wiring={"residual": "normed"}),
    "constant, residual input": CoordinateCheck("constant", 0.5 / 64, wiring={"residual": "input"}),
}
LARGEST_WIDTH = {"constant, residual input": 256}


def main() -> None:
    """Run every case at every width and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    results = {"seeds": arguments.seeds, "steps": next(iter(CASES.values())).steps, "scales": {}, "exponents": {}}
    for case, check in CASES.items():
        widths = [width for width in arguments.widths if width <= LARGEST_WIDTH.get(case, width)]
        scales = results["scales"][case] = measure(case, check, widths, arguments.seeds)
        results["exponents"][case] = exponents(scales)
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(case, json.dumps(results["exponents"][case], indent=1), flush=True)
    draw(results, HERE / "figure.png")


def measure(case: str, check: CoordinateCheck, widths: list[int], seeds: list[int]) -> Scales:
    """Return scales[activation][width], a list over seeds of the scale after the last step."""
    scales: Scales = {}
    for width in widths:
        start_s = time.perf_counter()
        for seed in seeds:
            for name, values in check.scales(width, seed).items():
                scales.setdefault(name, {}).setdefault(width, []).append(values[-1])
        print(f"{case}, width {width}: {time.perf_counter() - start_s:.0f} s", flush=True)
    return scales


def exponents(scales: Scales) -> dict[str, dict[str, float]]:
    """Return the exponent of the width for each activation, as mean and standard deviation over seeds."""
    found = {}
    for name, by_width in scales.items():
        slopes = [width_exponent(list(by_width), run) for run in zip(*by_width.values(), strict=True)]
        spread = statistics.stdev(slopes) if len(slopes) > 1 else math.nan
        found[name] = {"mean": round(statistics.mean(slopes), 4), "std": round(spread, 4)}
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot one panel per case: scale against width, one line per activation."""
    import matplotlib  # noqa: PLC0415 (an optional dependency, only for the figure)

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 (as above)

    figure, panels = plt.subplots(1, len(results["scales"]), figsize=(13, 4), sharey=True, layout="constrained")
    for panel, (case, by_name) in zip(panels, results["scales"].items(), strict=True):
        for name, by_width in by_name.items():
            widths = list(by_width)
            panel.plot(widths, [statistics.mean(runs) for runs in by_width.values()], marker="o", label=name)
        panel.set(title=case, xscale="log", yscale="log", xlabel="width")
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"root mean square after {results['steps']} steps")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
