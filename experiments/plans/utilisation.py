"""Utilization of a timed forward and backward pass of XUT-base, by the operation counts of the forecasts.

python experiments/plans/utilisation.py MS [--gpu h100 --resolution 256 --batch 64 --context 256]
"""

import argparse

from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.duration import step_time
from hdm_lightning.profiling.encoder_costs import (
    QWEN3_0_6B,
    SDXL_AUTOENCODER,
    AutoencoderArchitecture,
    TextArchitecture,
)
from hdm_lightning.profiling.gpus import Machine, parse_gpus
from hdm_lightning.profiling.planned_run import Recipe, StageRecipe


def main() -> None:
    """Print one line for each time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ms", nargs="+", type=float, help="milliseconds per call")
    parser.add_argument("--gpu", default="h100")
    for name, default in (("resolution", 256), ("batch", 64), ("context", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    machine, text = Machine(*parse_gpus(given.gpu)), TextArchitecture.from_config(QWEN3_0_6B)
    stage = StageRecipe(
        "timed", given.resolution, given.batch, given.batch, given.batch, 0.5, given.context, cached=True
    )
    recipe = Recipe(XUTConfig(), (stage,), text, AutoencoderArchitecture.from_config(SDXL_AUTOENCODER))
    step = step_time(recipe, stage, machine, given.batch, utilisation=1.0)
    encoder_s = given.batch * text.traffic_bytes(given.context) / (machine.gpu.bandwidth_gb_s * 1e9)
    for ms in given.ms:
        print(
            f"{ms:g} ms on {machine.gpu.name}: utilisation {(step.network + step.between - encoder_s) / ms * 1e3:.3f}"
        )


if __name__ == "__main__":
    main()
