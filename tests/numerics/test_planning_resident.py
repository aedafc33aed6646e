"""The memory forecast against the resident size of a process that takes real training steps."""

import os
import subprocess
import sys

import pytest

from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.encoder_costs import TINY_AUTOENCODER, TINY_TEXT, EncoderConfigs
from hdm_lightning.profiling.memory import device_memory
from hdm_lightning.profiling.planned_run import Recipe, StageRecipe

SHAPE = {"width": 256, "mlp_width": 768, "heads": 4, "head_dim": 64, "context_width": 32, "depth": 2}

# A small step first, so that libraries and kernels are in memory before the baseline is read.
PROGRAM = """
import gc, sys, torch
from hdm_lightning.profiling.encoder_costs import TINY_AUTOENCODER, TINY_TEXT
from hdm_lightning.cli.bench_training import TrainingStep
from hdm_lightning.models import XUTConfig
from hdm_lightning.training.stages import StageSettings

def resident(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def step(batch, shape):
    stage = StageSettings(resolution=256, samples=64, batch_size=batch, micro_batch_size=batch, learning_rate=1e-3,
                          routing_rate=0.5, context_length=24, activation_checkpointing=CHECKPOINTING)
    return TrainingStep(XUTConfig(**shape), TINY_TEXT, TINY_AUTOENCODER, stage, device=torch.device("cpu"),
                        dtype=torch.float32, autoencoder_max_pixels=1)

torch.set_num_threads(1)
small = step(1, {**SHAPE, "width": 64, "heads": 1, "mlp_width": 64})
small(); small()
del small
gc.collect()
baseline = resident("VmRSS")
large = step(BATCH, SHAPE)
large(); large()
print("bytes", resident("VmHWM") - baseline)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell a process's size")
@pytest.mark.parametrize(("batch", "checkpointing"), [(8, False), (32, True)])
def test_the_forecast_is_within_a_tenth_of_the_process_s_growth(batch, checkpointing):
    program = PROGRAM.replace("CHECKPOINTING", str(checkpointing)).replace("BATCH", str(batch))
    program = program.replace("SHAPE", repr(SHAPE))
    # Large blocks go back to the system as soon as they are free, as the forecast has it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    measured = int(result.stdout.split("bytes", 1)[1])
    recipe = Recipe(
        XUTConfig(**SHAPE),
        (StageRecipe("a", 256, 64, batch, batch, 0.5, 24, checkpointing),),
        *EncoderConfigs(TINY_TEXT, TINY_AUTOENCODER).architectures(),
        autoencoder_max_pixels=1,
        compiled=False,
        mixed=False,
    )
    assert device_memory(recipe, recipe.stages[0]).total == pytest.approx(measured, rel=0.1)
