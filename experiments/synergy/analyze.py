"""Analyze the trainings so far: `python -m experiments.synergy.analyze`.

It writes analysis.json, figure.png and the tables of README.md.

The primary endpoint was named before any training: the logarithm of `pixel_error`, a third each for square images, for
wide and tall ones by short side and for wide and tall ones by area. Its ten terms are one family for Holm's
correction; the terms of all other endpoints are another.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from experiments.synergy.design import Planned, planned
from experiments.synergy.effects import (
    PRIMARY_TERMS,
    Effect,
    Fit,
    in_words,
    interactions,
    main_effects,
    over_autoencoders,
)
from experiments.synergy.run import BASELINE, SHARES

from hdm_lightning.metrics.comparisons import holm

HERE = Path(__file__).parent
PRIMARY = "log pixel error"
Result = dict[str, Any]


def log_pixel_error(result: Result, kind: str = "pixel_error") -> float:
    """Return the primary endpoint of one training."""
    logs = {shape: math.log(errors[kind]) for shape, errors in result["errors"].items()}
    thirds = (["64x64"], ["64x96", "96x64"], ["48x80", "80x48"])
    return statistics.mean(statistics.mean(logs[shape] for shape in third) for third in thirds)


def beyond_square(result: Result) -> float:
    """Return how much larger the error of wide and tall images is than that of square ones, as a logarithm."""
    logs = {shape: math.log(errors["pixel_error"]) for shape, errors in result["errors"].items()}
    return statistics.mean(logs[shape] for shape in logs if shape != "64x64") - logs["64x64"]


def share_right(result: Result, drawn: str, *criteria: str) -> float:
    """Return the share of right answers in generated images, averaged over several criteria."""
    graded = result["drawn"][drawn]
    return statistics.mean(sum(graded["right"][each]) / sum(graded["trials"][each]) for each in criteria)


def attributes(result: Result, drawn: str) -> float:
    """Return the share of colors, shapes, sizes and backgrounds that are right."""
    return share_right(result, drawn, "colour", "shape", "size", "background")


def attributes_beyond_square(result: Result) -> float:
    """Return how much more is right in wide and tall images than in square ones."""
    wide = [attributes(result, f"{shape} {split}") for shape in ("64x96", "96x64") for split in ("heldout", "train")]
    square = [attributes(result, f"64x64 {split}") for split in ("heldout", "train")]
    return statistics.mean(wide) - statistics.mean(square)


ENDPOINTS: dict[str, tuple[Callable[[Result], float], str]] = {
    PRIMARY: (log_pixel_error, "lower"),
    "log latent loss": (lambda result: log_pixel_error(result, "latent_loss"), "lower"),
    "correct attributes, unseen pairs": (lambda result: attributes(result, "64x64 heldout"), "higher"),
    "correct attributes, seen pairs": (lambda result: attributes(result, "64x64 train"), "higher"),
    "correct color and shape, unseen pairs": (
        lambda result: share_right(result, "64x64 heldout", "colour_and_shape"),
        "higher",
    ),
    "kernel distance": (lambda result: result["kernel_distance"], "lower"),
    "log pixel error, wide and tall minus square": (beyond_square, "lower"),
    "correct attributes, wide and tall minus square": (attributes_beyond_square, "higher"),
}
"""Endpoints, and which way is better. The latent loss cannot be compared between EQ-VAE off and on."""


def read(folder: Path) -> dict[str, Result]:
    """Read all results by job name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def analyze(results: dict[str, Result]) -> dict[str, Any]:
    """Return the effects on every endpoint, with p over its family, and the effect of equal time."""
    jobs = [each for each in planned() if each.name in results]
    found: dict[str, Any] = {}
    for name, (value, better) in ENDPOINTS.items():
        fit = Fit.of(jobs, np.array([value(results[each.name]) for each in jobs]))
        effects = {"main": main_effects(fit), "interaction": interactions(fit)}
        of_pairs = over_autoencoders(fit)
        effects["main"] += [of_pairs] if of_pairs and name != "log latent loss" else []
        terms = {term: p for term in PRIMARY_TERMS if (p := fit.term_p(term)) is not None}
        if name == "log latent loss":
            terms.pop("eq", None)
        spread = {"residual": fit.error, "freedom": fit.freedom, "mean": float(fit.values.mean())}
        found[name] = {"better": better, **spread, "terms": terms, "effects": effects}
    corrected(found)
    return {
        "trainings": len(jobs),
        "planned": len(planned()),
        "commits": sorted({results[each.name]["made"]["commit"] for each in jobs}),
        "processors": sorted({results[each.name]["made"]["processor"] for each in jobs}),
        "endpoints": found,
        "more samples": more_samples(results),
        "cost": costs([results[each.name] for each in jobs]),
        "reconstruction": reconstruction_shares([results[each.name] for each in jobs]),
    }


def reconstruction_shares(results: list[Result]) -> dict[str, list[float]]:
    """Return the least and largest share of a training's pixel error due to the autoencoder, for EQ-VAE off and on."""
    shares: dict[str, list[float]] = {}
    for result in results:
        each = [error["reconstruction_error"] / error["pixel_error"] for error in result["errors"].values()]
        shares.setdefault(result["factors"]["eq"], []).append(statistics.mean(each))
    return {level: [min(several), max(several)] for level, several in sorted(shares.items())}


def corrected(found: dict[str, Any]) -> None:
    """Add p after Holm's correction: over the primary endpoint's terms, and over those of all others."""
    others = {(name, term): p for name, each in found.items() if name != PRIMARY for term, p in each["terms"].items()}
    keyed = {f"{name}|{term}": p for (name, term), p in others.items()}
    adjusted = holm(keyed)
    for name, each in found.items():
        each["holm"] = (
            holm(each["terms"]) if name == PRIMARY else {term: adjusted[f"{name}|{term}"] for term in each["terms"]}
        )


def more_samples(results: dict[str, Result]) -> dict[str, Any] | None:
    """Return the slope of the baseline's primary endpoint over log(samples); None unless all trainings exist."""
    points = []
    for seed in range(3):
        for share in SHARES:
            name = Planned(BASELINE, seed, 0).name + ("" if share == 1 else f"-samples{share:g}")
            if name not in results:
                return None
            points.append((seed, math.log(share), log_pixel_error(results[name])))
    slopes = [
        np.polyfit([x for s, x, _ in points if s == seed], [y for s, _, y in points if s == seed], 1)[0]
        for seed in range(3)
    ]
    return {"slope": float(np.mean(slopes)), "by_seed": [float(each) for each in slopes]}


def costs(results: list[Result]) -> dict[str, dict[str, float]]:
    """Return operations per sample and CPU seconds per training at each level, over the trainings with that level."""
    found: dict[str, dict[str, float]] = {}
    for factor in ("skips", "routing", "crop"):
        for level in dict.fromkeys(each["factors"][factor] for each in results):
            mine = [each for each in results if each["factors"][factor] == level]
            found[f"{factor} {in_words(level)}"] = {
                "operations_per_sample": statistics.mean(each["operations_per_sample"] for each in mine),
                "training_cpu_seconds": statistics.median(each["cpu_seconds"]["training"] for each in mine),
            }
    return found


def tables(analysis: dict[str, Any]) -> str:
    """Return the part of the README that is made of numbers."""
    primary = analysis["endpoints"][PRIMARY]
    lines = [
        f"**{analysis['trainings']} of {analysis['planned']} trainings are complete.** Commits "
        f"{', '.join(each[:7] for each in analysis['commits'])}; {', '.join(analysis['processors'])}, one core.",
        "",
    ]
    if primary["freedom"] < 1:
        return lines[0] + " That is fewer than there are coefficients: no effect is estimated yet.\n"
    lines += [
        f"Primary endpoint, {PRIMARY} (mean {primary['mean']:.3f}; residual standard deviation "
        f"{primary['residual']:.3f}, {primary['freedom']} degrees of freedom). −0.1 means an error 10% lower.",
        "",
        "| effect | change of log pixel error | 95% interval | p |",
        "|---|---:|---:|---:|",
        *(_row(each) for each in primary["effects"]["main"]),
        *(_row(each) for each in primary["effects"]["interaction"]),
        "",
        "![effects on the primary endpoint with their intervals](figure.png)",
        "",
        "| term | p | Holm-adjusted p, primary | other endpoints with Holm-adjusted p below 0.05 |",
        "|---|---:|---:|---|",
    ]
    for term in PRIMARY_TERMS:
        if term not in primary["terms"]:
            lines.append(f"| {term} | not estimable yet | | |")
            continue
        others = [
            name for name, each in analysis["endpoints"].items() if name != PRIMARY and each["holm"].get(term, 1) < 0.05
        ]
        lines.append(f"| {term} | {_p(primary['terms'][term])} | {_p(primary['holm'][term])} | {'; '.join(others)} |")
    lines += ["", *_other_endpoints(analysis)]
    lines += ["", "| level | operations per sample (M) | median CPU seconds per training |", "|---|---:|---:|"]
    for level, cost in analysis["cost"].items():
        lines.append(f"| {level} | {cost['operations_per_sample'] / 1e6:.0f} | {cost['training_cpu_seconds']:.0f} |")
    told = "; ".join(f"{low:.1%} to {high:.1%} ({level})" for level, (low, high) in analysis["reconstruction"].items())
    lines += ["", f"The autoencoder's own reconstruction accounts for this much of a training's pixel error: {told}."]
    if analysis["more samples"]:
        slope = analysis["more samples"]["slope"]
        own = ", ".join(f"{each:.2f}" for each in analysis["more samples"]["by_seed"])
        lines += [
            "",
            f"Doubling the samples changes the baseline's log pixel error by {slope * math.log(2):.3f} (slopes {own}).",
        ]
    return "\n".join(lines) + "\n\n" + verdicts(analysis)


def _other_endpoints(analysis: dict[str, Any]) -> list[str]:
    """Return the table of main effects on other endpoints: change and half of its 95% interval, a column per effect."""
    others = {name: each for name, each in analysis["endpoints"].items() if name != PRIMARY}
    names = list(dict.fromkeys(effect.name for each in others.values() for effect in each["effects"]["main"]))
    lines = ["| endpoint (better) | mean | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for endpoint, each in others.items():
        by_name = {effect.name: effect for effect in each["effects"]["main"]}
        if endpoint == "log latent loss":  # the latents differ with and without EQ-VAE
            by_name = {name: effect for name, effect in by_name.items() if not name.startswith("eq")}
        told = (f"{e.value:+.3f} ± {(e.high - e.low) / 2:.3f}" if (e := by_name.get(name)) else "" for name in names)
        lines.append(f"| {endpoint} ({each['better']}) | {each['mean']:.3f} | " + " | ".join(told) + " |")
    return lines


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _row(effect: Effect) -> str:
    return f"| {effect.name} | {effect.value:+.3f} | {effect.low:+.3f} to {effect.high:+.3f} | {_p(effect.p)} |"


def verdicts(analysis: dict[str, Any]) -> str:
    """Return one line per technique and pair, by rule: shown only if the term survives Holm's correction."""
    primary, saved = analysis["endpoints"][PRIMARY], equal_time(analysis)
    lines = [
        "By rule (a term counts as shown if its Holm-adjusted p is below 0.05; contrasts give its main effects):",
        "",
    ]
    for term in PRIMARY_TERMS:
        p = primary["holm"].get(term)
        if p is None:
            lines.append(f"- `{term}`: not estimable yet.")
            continue
        kind = "interaction" if ":" in term else "main"
        own = [each for each in primary["effects"][kind] if _belongs(each.name, term)]
        told = "; ".join(f"{each.name}: {each.value:+.3f} ({each.low:+.3f} to {each.high:+.3f})" for each in own)
        lines.append(f"- `{term}`: {'shown' if p < 0.05 else 'not shown'} (p {_p(p)}). {told}.{saved.get(term, '')}")
    return "\n".join(lines) + "\n"


def _belongs(name: str, term: str) -> bool:
    if ":" not in term:
        return name.startswith(f"{term}:")
    one, other = term.split(":")
    return name.startswith(f"{one} ") and f"× {other} " in name


def equal_time(analysis: dict[str, Any]) -> dict[str, str]:
    """Return the effect of routing's cheaper steps at equal operations, by the slope over samples, if there is one."""
    if not analysis["more samples"]:
        return {}
    cost = {level: each["operations_per_sample"] for level, each in analysis["cost"].items()}
    if not {"routing 0", "routing 0.5"} <= set(cost):
        return {}
    gain = analysis["more samples"]["slope"] * math.log(cost["routing 0"] / cost["routing 0.5"])
    times = cost["routing 0"] / cost["routing 0.5"]
    told = (
        f" At equal operations routing sees {times:.2f} times the samples: another {gain:+.3f} by the baseline's slope."
    )
    return {"routing": told}


def draw(analysis: dict[str, Any], path: Path) -> None:
    """Plot the effects on the primary endpoint with their intervals."""
    import matplotlib as mpl  # noqa: PLC0415 (tests of the tables do without it)

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    effects = analysis["endpoints"][PRIMARY]["effects"]
    shown = [*effects["main"], *effects["interaction"]]
    figure, axis = plt.subplots(figsize=(8, 0.26 * len(shown) + 1.2))
    for place, each in enumerate(shown):
        colour = "tab:blue" if place < len(effects["main"]) else "tab:gray"
        axis.plot([each.low, each.high], [place, place], color=colour)
        axis.plot(each.value, place, "o", color=colour, markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [each.name for each in shown], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("change of log pixel error (left is better), 95% interval")
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def put_between(page: Path, text: str) -> None:
    """Write text between the page's two markers."""
    begin, end = "<!-- numbers -->\n", "<!-- end of numbers -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def plain(value: Any) -> Any:
    """Convert for JSON: effects as mappings, numbers with five digits."""
    if isinstance(value, Effect):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def main() -> None:
    """Analyze the results so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    analysis = analyze(read(parser.parse_args().results))
    (HERE / "analysis.json").write_text(json.dumps(plain(analysis), indent=1) + "\n")
    if analysis["endpoints"][PRIMARY]["freedom"] >= 1:
        draw(analysis, HERE / "figure.png")
    put_between(HERE / "README.md", tables(analysis))
    print(tables(analysis))


if __name__ == "__main__":
    main()
