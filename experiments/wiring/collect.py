"""Collect the wiring sweeps: validation loss and prompt-following of each job, as results.json and figure.png."""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from hdm_lightning.datasets.shapes import scene_prompts
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.generation.scoring import draw_and_score
from hdm_lightning.training.run_folder import is_finished

HERE = Path(__file__).parent
FIELDS = ("residual", "skips", "text", "rate")
"""Settings that differ between jobs, besides the seed."""


def measure(job: Path, prompts: int, rule: str) -> dict[str, object]:
    """Return one job's wiring, seed, final losses and scores on held-out single objects."""
    config = yaml.safe_load((job / "config.yaml").read_text())
    done = json.loads(next(iter(sorted(job.glob("*/done.json")))).read_text())
    loaded = load_pipeline(job, LoadOptions(max_batch=64))
    asked = scene_prompts(prompts, rule=rule, split="heldout")
    settings = SamplingSettings.from_json(loaded.sampling)
    scored = draw_and_score(loaded.pipeline, [p.caption for p in asked], [p.spec for p in asked], settings)
    scores = scored.graded.scores()
    return {
        "residual": config["model"]["residual"],
        "skips": config["model"]["skips"],
        "text": "white" if config["text_encoder"]["whiten_captions"] else "plain",
        "rate": next(iter(config["schedule"]["stages"].values()))["learning_rate"],
        "seed": config["seed"],
        "validation": done["validation"],
        "samples": done["samples"],
        "scores": {name: scores[name]["share"] for name in ("colour", "shape", "colour_and_shape")},
    }


def summarise(rows: list[dict]) -> list[dict]:
    """Return mean and standard deviation over seeds of each wiring."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[field] for field in FIELDS)].append(row)
    summary = []
    for key, group in sorted(groups.items()):
        ema = next(name for name in group[0]["validation"] if name.startswith("ema"))
        entry = {**dict(zip(FIELDS, key, strict=True)), "seeds": len(group)}
        for name, values in (
            ("loss", [row["validation"][ema] for row in group]),
            ("colour", [row["scores"]["colour"] for row in group]),
            ("colour_and_shape", [row["scores"]["colour_and_shape"] for row in group]),
        ):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            entry[name] = {"mean": statistics.mean(values), "std": spread, "values": values}
        summary.append(entry)
    return summary


def draw(summary: list[dict], path: Path) -> None:
    """Plot loss and prompt-following of the wirings, one point per seed."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 3.6))
    for axis, (key, label) in zip(
        axes, (("loss", "validation loss"), ("colour_and_shape", "colour and shape right")), strict=True
    ):
        for place, entry in enumerate(summary):
            axis.errorbar(place, entry[key]["mean"], entry[key]["std"], fmt="o", capsize=4, color="tab:blue")
            axis.plot([place] * entry["seeds"], entry[key]["values"], ".", color="tab:gray")
        names = ["\n".join(str(entry[field]) for field in FIELDS) for entry in summary]
        axis.set_xticks(range(len(summary)), names, fontsize=7)
        axis.set_title(label)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure every finished job of the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    sweeps = [Path("multirun") / name for name in ("wiring", "wiring_rates", "wiring_plain_text")]
    parser.add_argument("--sweeps", type=Path, nargs="+", default=sweeps)
    parser.add_argument("--prompts", type=int, default=128)
    rule = "what the shards hold out: pairs, or triples (shards built before there was a choice)"
    parser.add_argument("--held-out", default="pairs", choices=("pairs", "triples"), help=rule)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    jobs = sorted(job for sweep in arguments.sweeps for job in sweep.glob("*/") if is_finished(job))
    rows = [measure(job, arguments.prompts, arguments.held_out) for job in jobs]
    summary = summarise(rows)
    (HERE / "results.json").write_text(json.dumps({"summary": summary, "jobs": rows}, indent=2) + "\n")
    draw(summary, HERE / "figure.png")
    for entry in summary:
        loss, right = entry["loss"], entry["colour_and_shape"]
        print(
            *(f"{entry[field]:<9}" for field in FIELDS),
            f"loss {loss['mean']:.4f} ± {loss['std']:.4f}",
            f"colour and shape {right['mean']:.1%} ± {right['std']:.1%}",
        )


if __name__ == "__main__":
    main()
