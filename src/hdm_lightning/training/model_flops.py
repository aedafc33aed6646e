"""How much a training step computes, and what share of a device's peak that is.

Shapes: B batch, H x W image in pixels, L text tokens.
"""

from functools import lru_cache

import torch

from hdm_lightning.models import XUTConfig
from hdm_lightning.models.counts import TRAINING_FACTOR, Workload, forward_flops
from hdm_lightning.planning.gpus import find_gpu
from hdm_lightning.training.stages import StageSettings


@lru_cache(maxsize=1024)
def training_flops(config: XUTConfig, latent: tuple[int, int], text: int, rate: float = 0.0) -> int:
    """Operations of one sample's forward and backward pass through the network.

    These are the model FLOPs of arXiv 2204.02311, appendix B: matrix products, two operations a multiply-add,
    nothing counted twice (recomputed activations do not count), the frozen encoders left out.

    Args:
        config: of the network.
        latent: height and width of the latent in cells.
        text: text tokens fed, padding included.
        rate: TREAD's share of image tokens that skip the U.

    Raises:
        ValueError: see `models.counts.Workload.of`.
    """
    work = Workload.of(config, *latent, text, rate=rate)
    return TRAINING_FACTOR * forward_flops(config, work).total


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
