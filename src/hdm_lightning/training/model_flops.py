"""How much a training step computes, and what share of a device's peak that is.

Shapes: B batch, H x W image in pixels, L text tokens.
"""

import torch

from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.gpus import find_gpu
from hdm_lightning.profiling.operations import training_flops
from hdm_lightning.training.stages import StageSettings


def stage_flops(config: XUTConfig, stage: StageSettings, factor: int) -> int:
    """Operations of one sample of a stage, captions padded to the stage's context.

    Args:
        config: of the network.
        stage: resolution, context and routing.
        factor: image pixels per latent cell along one side.
    """
    side = stage.resolution // factor
    return training_flops(config, (side, side), stage.context_length, stage.routing_rate)


def peak_tflops(device: torch.device, configured: float | None) -> float | None:
    """Dense bfloat16 rate of the device in 10^12 operations a second: as configured, else of a known GPU, else None."""
    if configured is not None:
        return configured
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.peak_tflops if gpu else None
