"""The memory that a step is said to take, against what the same step takes on real tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdm_lightning.cli.plan_autoencoder import AutoencoderStep, step_memory
from hdm_lightning.profiling.live_memory import LiveMemory
from hdm_lightning.training.autoencoder_run import AutoencoderRecipe
from hdm_lightning.training.composition import parse
from hdm_lightning.training.stages import AutoencoderStageSettings

CONFIG = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}


def settings(side=64, batch=2, **groups):
    stage = {"resolution": side, "samples": 1, "batch_size": batch, "micro_batch_size": batch, "learning_rate": 1.0}
    stage |= groups.pop("stage", {})
    groups = {"loss": {"perceptual_network": "efficientnet_lite0"}, **groups}
    parsed = {name: parse(kind, groups.get(name, {}), name) for name, kind in AutoencoderRecipe.groups.items()}
    return parsed, parse(AutoencoderStageSettings, stage, "stage")


def rehearsed(run, config=CONFIG, *, mixed=False, micro_batches=1):
    return step_memory(lambda: AutoencoderStep(*run, config, mixed=mixed), micro_batches=micro_batches)


ADVERSARIAL = {"adversarial": {"weight": 0.5, "channels": 32}}


@pytest.mark.parametrize(
    ("groups", "mixed", "accumulates"),
    [
        ({}, False, False),
        (ADVERSARIAL, False, False),
        (ADVERSARIAL, True, True),
        ({**ADVERSARIAL, "stage": {"activation_checkpointing": True}}, False, True),
    ],
    ids=["plain", "adversarial", "mixed and accumulated", "checkpointed"],
)
def test_the_rehearsal_is_what_real_tensors_take(groups, mixed, accumulates):
    micro_batches = 2 if accumulates else 1
    said = rehearsed(settings(**groups), mixed=mixed, micro_batches=micro_batches)
    with LiveMemory() as memory:
        step = AutoencoderStep(*settings(**groups), CONFIG, mixed=mixed)
        for _ in range(2):
            step(micro_batches)
    assert said.peak == pytest.approx(memory.peak_bytes, rel=0.02)
    trained = sum(parameter.numel() for parameter in step.trained)
    own = sum(parameter.numel() for parameter in step.networks[0].parameters())
    assert (said.parameters, said.gradients, said.moments) == (own, 4 * trained, 8 * trained)
    assert said.averages == 4 * own
    assert said.peak > said.kept + said.gradients


def test_without_the_adaptive_weight_no_gradient_is_taken_twice(monkeypatch):
    fixed = settings(adversarial={"weight": 0.5, "channels": 32, "adaptive": False})
    monkeypatch.setattr("torch.autograd.grad", None)
    AutoencoderStep(*fixed, CONFIG)(1)


def test_what_saves_memory_is_seen_to():
    whole = rehearsed(settings())
    frozen = rehearsed(settings(autoencoder={"train_encoder": False}))
    again = settings(stage={"activation_checkpointing": True})
    recomputed = rehearsed(again)
    larger = rehearsed(settings(batch=4))
    assert frozen.parameters == whole.parameters
    assert frozen.moments < whole.moments and frozen.passing < whole.passing
    assert recomputed.passing < 0.7 * whole.passing
    assert larger.kept == whole.kept
    assert 1.6 < larger.passing / whole.passing < 2.1


# In a process of its own: what it has when all libraries are in, after a small step, and at its fullest.
SDXL_STEP = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_vae_memory import ADVERSARIAL, CONFIG, SDXL, settings
from hdm_lightning.cli.plan_autoencoder import AutoencoderStep
AutoencoderStep(*settings(**ADVERSARIAL), CONFIG, mixed=False)(1)
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
step = AutoencoderStep(*settings(side=128, batch=1, adversarial={{"weight": 0.5}}), SDXL, mixed=False)
for _ in range(2):
    step(1)
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 - before)
"""
# Tensors get pages of their own, which go back when they die: else the heap's gaps would count as well.
PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SDXL = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}


@pytest.mark.slow
def test_an_adversarial_step_at_the_size_of_sdxl_fills_the_process_as_forecast():
    said = rehearsed(settings(side=128, batch=1, adversarial={"weight": 0.5}), SDXL)
    assert said.parameters == 83_653_863
    code = SDXL_STEP.format(tests=str(Path(__file__).parent))
    command, environment = [sys.executable, "-c", code], {**os.environ, **PAGES}
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800, env=environment)
    assert int(result.stdout) == pytest.approx(said.peak, rel=0.1)
