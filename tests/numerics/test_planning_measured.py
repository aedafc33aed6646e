"""The forecast of memory against peaks that a GPU measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.encoder_costs import QWEN3_0_6B, SDXL_AUTOENCODER, EncoderConfigs
from hdm_lightning.profiling.memory import GIB, device_memory
from hdm_lightning.profiling.planned_run import Recipe, StageRecipe

FILE = Path(__file__).parents[2] / "experiments" / "benchmarks" / "h100_early" / "measured.json"
MEASURED = json.loads(FILE.read_text())
ENCODERS = EncoderConfigs(QWEN3_0_6B, SDXL_AUTOENCODER).architectures()
RECIPE = Recipe(XUTConfig.preset(MEASURED["model"]), (), *ENCODERS)


@pytest.mark.parametrize("row", MEASURED["results"])
def test_a_measured_peak_is_within_a_tenth_of_the_forecast(row):
    """Of the network alone: weights, their half copies and activations; no gradient is left from the pass before.

    Where graphs broke, more is kept than by whole blocks: within a tenth even so.
    """
    stage = StageRecipe(
        "measured",
        MEASURED["resolution"],
        samples=6400,
        batch_size=MEASURED["batch"],
        micro_batch_size=MEASURED["batch"],
        routing_rate=MEASURED["routing_rate"],
        context_length=row["text_tokens"],
    )
    memory = device_memory(replace(RECIPE, compiled=row["compiled"]), stage)
    alone = memory.weights + memory.half_copies + memory.activations
    counted = memory.total if row["part"] == "step" else alone
    assert counted / GIB == pytest.approx(row["peak_gib"], rel=0.10 if row["graph_breaks"] else 0.02)
