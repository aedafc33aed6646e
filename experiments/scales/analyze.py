"""Analyze the trainings so far: `python -m experiments.scales.analyze`.

It writes analysis.json, figure.png and the tables of README.md.
"""

import argparse
import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experiments.scales.law import Interval, Law, best_rate_interval, fit, interval, predicted, resampled, seed_spread
from experiments.scales.plan import BATCHES, RATE_WIDTHS, jobs, trainings
from experiments.synergy.analyze import plain, put_between, read

from hdm_lightning.profiling.duration import CALIBRATED_UTILISATION
from hdm_lightning.profiling.gpus import GPUS

HERE = Path(__file__).parent
CARD = "5090"
PAPER = {"parameters": 343e6, "samples": 207e6}
"""XUT-base and the number of images in the paper's four stages."""
Result = dict[str, Any]


def of_kind(results: dict[str, Result], kind: str) -> list[Result]:
    """Return the available results of the trainings of a kind."""
    return [results[each.name] for each in trainings() if each.kind == kind and each.name in results]


def column(rows: list[Result], name: str) -> np.ndarray:
    """Return one number of each result."""
    return np.array([row[name] for row in rows], dtype=np.float64)


def analyze(results: dict[str, Result]) -> dict[str, Any]:
    """Return the law with its predictions, the best rate of each width and batch, and the cost of each training."""
    found: dict[str, Any] = {
        "trainings": sum(each.name in results for each in jobs()),
        "planned": len(jobs()),
        "commits": sorted({each["made"]["commit"] for each in results.values()}),
        "processors": sorted({each["made"]["processor"] for each in results.values()}),
        "cells": cells(of_kind(results, "law") + of_kind(results, "held out")),
        "rates": {rule: best_rates(of_kind(results, "rates"), rule) for rule in ("mup", "constant")},
        "losses_by_rate": losses_by_rate(of_kind(results, "rates")),
        "batches": batches(of_kind(results, "batches")),
    }
    rows = of_kind(results, "law")
    if len({row["width"] for row in rows}) >= 3 and len({row["samples"] for row in rows}) >= 3:
        found["law"] = law_of(rows, of_kind(results, "held out"))
    return found


def cells(rows: list[Result]) -> list[dict[str, float]]:
    """Return the mean loss of each width and length, with its cost."""
    found = []
    for width, samples in sorted({(row["width"], row["samples"]) for row in rows}):
        mine = [row for row in rows if (row["width"], row["samples"]) == (width, samples)]
        loss = column(mine, "loss")
        operations = mine[0]["operations_per_sample"] * samples
        found.append(
            {
                "width": width,
                "samples": samples,
                "parameters": mine[0]["parameters"],
                "operations": operations,
                "usd": dollars(operations),
                "cpu_seconds": float(np.median([row["cpu_seconds"]["training"] for row in mine])),
                "loss": float(loss.mean()),
                "std": float(loss.std(ddof=1)) if len(loss) > 1 else 0.0,
                "trainings": len(mine),
            }
        )
    return found


def dollars(operations: float) -> float:
    """Return the cost of the network's operations on the paper's card at the utilization that plans use."""
    card = GPUS[CARD]
    return operations / (card.peak_tflops * 1e12 * CALIBRATED_UTILISATION) / 3600 * card.usd_per_hour


def law_of(rows: list[Result], held_out: list[Result]) -> dict[str, Any]:
    """Return the law with intervals, its residuals, and held-out points beside its predictions."""
    size, samples, loss = (column(rows, name) for name in ("parameters", "samples", "loss"))
    law, laws = fit(size, samples, loss), resampled(size, samples, loss)
    noise = spread(rows)
    points = [checked(law, laws, noise, part) for part in cells(held_out)]
    names = ("floor", "of_size", "of_samples", "alpha", "beta")
    return {
        "coefficients": {name: interval(getattr(law, name), [getattr(each, name) for each in laws]) for name in names},
        "relative_residual": float(np.std(law(size, samples) / loss - 1)),
        "relative_noise": noise,
        "held_out": points,
        "far_beyond": predicted(law, laws, PAPER["parameters"], PAPER["samples"], 0.0),
    }


def spread(rows: list[Result]) -> float:
    """Return the relative standard deviation among trainings that differ only in their seed."""
    groups: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["width"], row["samples"]), []).append(row["loss"])
    several = [np.log(each) for each in groups.values() if len(each) > 1]
    freedom = sum(len(each) - 1 for each in several)
    return float(np.sqrt(sum(((each - each.mean()) ** 2).sum() for each in several) / freedom)) if freedom else 0.0


def checked(law: Law, laws: list[Law], noise: float, cell: dict[str, float]) -> dict[str, Any]:
    """Return a held-out point beside its prediction, which is for a mean of as many trainings."""
    told = predicted(law, laws, cell["parameters"], cell["samples"], noise / cell["trainings"] ** 0.5)
    return {**cell, "predicted": told, "inside": told.low <= cell["loss"] <= told.high}


def best_rates(rows: list[Result], rule: str) -> dict[str, Interval]:
    """Return the rate of least loss of each width that has results for at least three rates."""
    found = {}
    for width in RATE_WIDTHS:
        mine = [row for row in rows if row["width"] == width and row["rule"] == rule]
        rate, loss, seed = (column(mine, name) for name in ("rate", "loss", "seed"))
        other = [row for row in rows if row["width"] == width and row["rule"] != rule]
        own = seed_spread(rate, loss, seed) if len(mine) else np.nan
        if np.isnan(own) and other:  # one seed: use the spread of the other rule's trainings
            own = seed_spread(*(column(other, name) for name in ("rate", "loss", "seed")))
        if len(set(rate)) >= 3 and not np.isnan(own):
            found[str(width)] = best_rate_interval(rate, loss, seed, spread=own)
    return found


def losses_by_rate(rows: list[Result]) -> list[dict[str, Any]]:
    """Return the mean loss of every width at each rate of each rule, at equal samples and batch."""
    found = []
    for rule, rate in sorted({(row["rule"], row["rate"]) for row in rows}, reverse=True):
        mine = [row for row in rows if (row["rule"], row["rate"]) == (rule, rate)]
        losses = {width: column([row for row in mine if row["width"] == width], "loss") for width in RATE_WIDTHS}
        found.append({"rule": rule, "rate": rate, **{str(width): float(each.mean()) for width, each in losses.items()}})
    return found


def batches(rows: list[Result]) -> dict[str, Any]:
    """Return for each batch the best rate and the mean loss at the best rate tried, at equal samples."""
    found = {}
    for batch in BATCHES:
        mine = [row for row in rows if row["batch"] == batch]
        rate, loss, seed = (column(mine, name) for name in ("rate", "loss", "seed"))
        if len(set(rate)) >= 3 and len(set(seed)) > 1:
            means = {float(each): float(loss[rate == each].mean()) for each in np.unique(rate)}
            best = min(means, key=lambda each: means[each])
            found[str(batch)] = {"rate": best_rate_interval(rate, loss, seed), "tried": best, "loss": means[best]}
    return found


def tables(found: dict[str, Any]) -> str:
    """Return the part of the README that is made of numbers."""
    lines = [
        f"**{found['trainings']} of {found['planned']} trainings are complete.** Commits "
        f"{', '.join(each[:7] for each in found['commits'])}; {', '.join(found['processors'])}, one core.",
        "",
        "![loss over operations, and over the base rate under both rules](figure.png)",
        "",
        "| width | samples | parameters (M) | operations (10¹²) | dollars | CPU seconds | loss | trainings |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_cell_row(cell) for cell in found["cells"]]
    if "law" in found:
        lines += ["", *_law_lines(found["law"])]
    lines += ["", "| rule | width | best base rate | 95% interval |", "|---|---:|---:|---:|"]
    for rule, by_width in found["rates"].items():
        lines += [f"| {rule} | {width} | {_span(each)} |" for width, each in by_width.items()]
    lines += ["", f"| rule | base rate | {' | '.join(f'loss at width {width}' for width in RATE_WIDTHS)} |"]
    lines += ["|---|---:|" + "---:|" * len(RATE_WIDTHS)]
    for row in found["losses_by_rate"]:
        losses = " | ".join(f"{row[str(width)]:.4f}" for width in RATE_WIDTHS)
        lines.append(f"| {row['rule']} | {row['rate']:g} | {losses} |")
    lines += ["", "| batch | best base rate | 95% interval | loss at the best rate tried |", "|---:|---:|---:|---:|"]
    lines += [f"| {batch} | {_span(each['rate'])} | {each['loss']:.4f} |" for batch, each in found["batches"].items()]
    return "\n".join(lines) + "\n"


def _cell_row(cell: dict[str, float]) -> str:
    cost = f"{cell['parameters'] / 1e6:.2f} | {cell['operations'] / 1e12:.2f} | {cell['usd']:.1e}"
    spread = f" ± {cell['std']:.4f}" if cell["trainings"] > 1 else ""
    loss = f"{cell['loss']:.4f}{spread} | {cell['trainings']}"
    return f"| {cell['width']} | {cell['samples']:,} | {cost} | {cell['cpu_seconds']:.0f} | {loss} |"


def _law_lines(law: dict[str, Any]) -> list[str]:
    told = {name: f"{each.value:.3g} ({each.low:.3g} to {each.high:.3g})" for name, each in law["coefficients"].items()}
    far = law["far_beyond"]
    lines = [
        f"L = E + A·(N/10⁶)^−α + B·(D/10⁴)^−β: E {told['floor']}, A {told['of_size']}, α {told['alpha']}, B "
        f"{told['of_samples']}, β {told['beta']}. Relative residual {law['relative_residual']:.1%}; relative "
        f"standard deviation over seeds {law['relative_noise']:.1%}.",
        "",
        "| held out: width | samples | loss | predicted | 95% interval | inside |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for point in law["held_out"]:
        told_ = point["predicted"]
        lines.append(
            f"| {point['width']} | {point['samples']:,} | {point['loss']:.4f} | {told_.value:.4f} | "
            f"{told_.low:.4f} to {told_.high:.4f} | {'yes' if point['inside'] else '**no**'} |"
        )
    lines += [
        "",
        f"For the paper's 343M parameters and 207M samples, the law gives {far.value:.3g} ({far.low:.3g} to "
        f"{far.high:.3g}): 150 times the largest network and 16,000 times the longest training in the fit, with "
        "another dataset and other encoders. **It must not be used for that.**",
    ]
    return lines


def _span(each: Interval) -> str:
    if each.at_edge:
        return f"{each.value:.3g} (at the edge of the range tried) | no optimum found"
    return f"{each.value:.3g} | {each.low:.3g} to {each.high:.3g}"


def draw(found: dict[str, Any], results: dict[str, Result], path: Path) -> None:
    """Plot loss over operations for each length, and over the base rate for each width under both rules."""
    import matplotlib as mpl  # noqa: PLC0415 (tests of the tables do without it)

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True)
    for samples in sorted({cell["samples"] for cell in found["cells"]}):
        mine = [cell for cell in found["cells"] if cell["samples"] == samples]
        numbers = [[cell[name] for cell in mine] for name in ("operations", "loss", "std")]
        axes[0].errorbar(*numbers, marker="o", capsize=3, label=f"{samples:,} samples")
    axes[0].set(xscale="log", yscale="log", xlabel="operations of the network", ylabel="loss", title="size and samples")
    for axis, rule in zip(axes[1:], ("mup", "constant"), strict=True):
        for width in RATE_WIDTHS:
            mine = [row for row in of_kind(results, "rates") if row["width"] == width and row["rule"] == rule]
            rates = sorted({row["rate"] for row in mine})
            means = [float(np.mean([row["loss"] for row in mine if row["rate"] == rate])) for rate in rates]
            axis.plot(rates, means, marker="o", label=f"width {width}")
        axis.set(xscale="log", xlabel="base rate", title=f"rule={rule}")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def simple(value: Any) -> Any:
    """Convert to plain values for JSON."""
    if isinstance(value, dict):
        return {key: simple(each) for key, each in value.items()}
    if isinstance(value, list):
        return [simple(each) for each in value]
    return plain(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value)


def main() -> None:
    """Analyze the results so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    results = read(parser.parse_args().results)
    found = analyze(results)
    (HERE / "analysis.json").write_text(json.dumps(simple(found), indent=1) + "\n")
    draw(found, results, HERE / "figure.png")
    put_between(HERE / "README.md", tables(found))
    print(tables(found))


if __name__ == "__main__":
    main()
