"""Run the study job by job, resuming where it stopped: `python -m experiments.scales.run`, from the top folder.

One core, about three hours. Every training sees every scene at most once.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experiments.scales.plan import HEAD_DIM, Training, jobs
from experiments.study_jobs import cpu_seconds, run_jobs, train
from experiments.synergy.measure import VARIATION, one_step_errors

from hdm_lightning.datasets.shapes import build_shapes
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.profiling.operations import parameter_count, training_flops

HERE = Path(__file__).parent
SHAPES = ((64, 64), (64, 96), (96, 64))
TEXT_TOKENS, ROUTING = 13, 0.5
SCENES = 26_000


def main() -> None:
    """Run the jobs without a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/scales"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.results, arguments.runs.absolute())


def run(results: Path, runs: Path) -> None:
    """Make the scenes, the autoencoder, and all trainings."""
    if not (runs / "shards" / "index.json").exists():
        aspects = (1.0, 1.5, 2 / 3)
        build_shapes(runs / "shards", count=SCENES, aspects=aspects, variation=VARIATION, encoding="png", processes=1)
    data = f"data.train={runs / 'shards'}"
    if not (runs / "autoencoder" / "final" / "config.json").exists():
        train("train_vae", ["vae_training=demo", data, "stage.micro_batch_size=16"], runs / "autoencoder")
    run_jobs({each.name: partial(job, each, runs) for each in jobs()}, results, scratch=runs / "trainings")


def job(what: Training, runs: Path) -> dict[str, Any]:
    """Train and measure one network."""
    seconds: dict[str, float] = {}
    folder = runs / "trainings" / what.name
    places = [f"vae.name={runs / 'autoencoder' / 'final'}", f"data.train={runs / 'shards'}"]
    with cpu_seconds(seconds, "training"):
        train("train", [*overrides(what), *places], folder)
    pipeline = load_pipeline(folder, LoadOptions(max_batch=64)).pipeline
    with cpu_seconds(seconds, "measuring"):
        errors = {f"{height}x{width}": one_step_errors(pipeline, height, width) for height, width in SHAPES}
    done = json.loads(next(iter(sorted(folder.glob("*/done.json")))).read_text())
    config = pipeline.network.config
    return {
        "width": what.width,
        "samples": done["samples"],
        "rate": what.rate,
        "rule": what.rule,
        "batch": what.batch,
        "seed": what.seed,
        "parameters": parameter_count(config),
        "operations_per_sample": training_flops(config, (16, 16), TEXT_TOKENS, ROUTING),
        "loss": statistics.mean(each["latent_loss"] for each in errors.values()),
        "pixel_error": statistics.mean(each["pixel_error"] for each in errors.values()),
        "errors": errors,
        "cpu_seconds": seconds,
    }


def overrides(what: Training) -> list[str]:
    """Return the `hdm-train` overrides of one training: warm-up over a tenth of the samples, cosine to their end."""
    stage = "schedule.stages.px64"
    return [
        "experiment=scales",
        f"seed={what.seed}",
        f"model.width={what.width}",
        f"model.heads={what.width // HEAD_DIM}",
        f"model.mlp_width={3 * what.width}",
        f"module.rule={what.rule}",
        f"{stage}.learning_rate={what.rate}",
        f"{stage}.samples={what.samples}",
        f"{stage}.warmup_samples={what.samples // 10}",
        f"{stage}.batch_size={what.batch}",
        f"{stage}.micro_batch_size={min(what.batch, 32)}",
    ]


if __name__ == "__main__":
    main()
