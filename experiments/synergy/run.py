"""Run the study job by job, resuming where it stopped: `python -m experiments.synergy.run`, from the top folder.

A job is one training of the design with all its measures, or one of the baseline with more or fewer samples.
Autoencoders are trained when the first job needs them: EQ-VAE off and on with one seed are a pair. One core, about
two hours.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experiments.study_jobs import cpu_seconds, run_jobs, train
from experiments.synergy.design import Cell, Planned, planned
from experiments.synergy.measure import VARIATION, measure

from hdm_lightning.datasets.shapes import build_shapes
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.profiling.operations import parameter_count, training_flops

HERE = Path(__file__).parent
SAMPLES = 9_600
BASELINE = Cell("mirrored", "0.5", "on", "shifted")
"""The paper's techniques together; also trained with other numbers of samples, to see the effect of more samples."""
SHARES = (0.5, 1.0, 2.0)
CROPS = {
    "centre": ["data.crop.centre=true"],
    "shifted": ["data.crop.centre=false"],
    "buckets": ["data.crop.buckets={step_px:16,max_aspect:2.0}"],
}
EQ = {"off": ["equivariance.equivariant=0", "equivariance.downscaled=0"], "on": []}
LATENTS = {"centre": [(16, 16)], "shifted": [(16, 16)], "buckets": [(16, 16), (12, 20), (20, 12)]}
"""Latent sizes of a training, each for an equal share of the samples."""
TEXT_TOKENS = 13


def main() -> None:
    """Run the jobs without a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/synergy"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.results, arguments.runs.absolute())


def run(results: Path, runs: Path) -> None:
    """Run all jobs: the design's, then those of the baseline with other numbers of samples."""
    shards(runs / "shards")
    jobs = {each.name: partial(job, each, 1.0, runs) for each in planned()}
    for seed in range(3):
        for share in SHARES:
            each = Planned(BASELINE, seed, 0)
            name = each.name if share == 1 else f"{each.name}-samples{share:g}"
            jobs[name] = partial(job, each, share, runs)
    run_jobs(jobs, results, scratch=runs / "trainings")


def shards(folder: Path) -> None:
    """Make the training set: 6,000 scenes of one object, a third of them square, a third wide, a third tall."""
    if not (folder / "index.json").exists():
        aspects = (1.0, 1.5, 2 / 3)
        build_shapes(folder, count=6_000, aspects=aspects, variation=VARIATION, encoding="png", processes=1)


def job(what: Planned, share: float, runs: Path) -> dict[str, Any]:
    """Train one cell and measure it."""
    cell, seconds = what.cell, {}
    autoencoder = autoencoder_of(cell.eq, what.block, runs)
    folder = runs / "trainings" / (what.name if share == 1 else f"{what.name}-samples{share:g}")
    samples = round(SAMPLES * share)
    with cpu_seconds(seconds, "training"):
        train("train", [*overrides(what, samples), f"vae.name={autoencoder}", f"data.train={runs / 'shards'}"], folder)
    with cpu_seconds(seconds, "measuring"):
        pipeline = load_pipeline(folder, LoadOptions(max_batch=64)).pipeline
        found = measure(pipeline)
    done = json.loads(next(iter(sorted(folder.glob("*/done.json")))).read_text())
    config = pipeline.network.config
    flops = [training_flops(config, size, TEXT_TOKENS, float(cell.routing)) for size in LATENTS[cell.crop]]
    return {
        "factors": {"skips": cell.skips, "routing": cell.routing, "eq": cell.eq, "crop": cell.crop},
        "seed": what.seed,
        "autoencoder_seed": what.block,
        "samples": done["samples"],
        "parameters": parameter_count(config),
        "operations_per_sample": sum(flops) / len(flops),
        "cpu_seconds": seconds,
        "validation": done["validation"],
        **found,
    }


def overrides(what: Planned, samples: int) -> list[str]:
    """Return the overrides of `hdm-train` for one cell."""
    stage = "schedule.stages.px64"
    return [
        "experiment=synergy",
        f"seed={what.seed}",
        f"model.skips={what.cell.skips}",
        f"{stage}.routing_rate={what.cell.routing}",
        f"{stage}.samples={samples}",
        *CROPS[what.cell.crop],
    ]


def autoencoder_of(eq: str, seed: int, runs: Path) -> Path:
    """Return the demo's autoencoder on the study's scenes, trained if it does not exist yet."""
    folder = runs / "autoencoders" / f"{eq}-{seed}"
    if not (folder / "final" / "config.json").exists():
        data = f"data.train={runs / 'shards'}"
        train("train_vae", ["vae_training=demo", f"seed={seed}", data, "stage.micro_batch_size=16", *EQ[eq]], folder)
    return folder / "final"


if __name__ == "__main__":
    main()
