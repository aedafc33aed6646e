"""How fast a training is: images a second, operations a second, where a step's time goes, memory."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.models import XUTConfig
from hdm_lightning.training.callbacks.memory_use import memory_gb
from hdm_lightning.training.callbacks.section_timer import SectionTimer
from hdm_lightning.training.callbacks.steps import StepWatcher, log_now, logs_now, samples_trained
from hdm_lightning.training.model_flops import peak_tflops, training_flops
from hdm_lightning.training.strategies.processes import summed


class Throughput(StepWatcher, Callback):
    """Logs speed, memory and the split of a step's time where Lightning logs (`log_every_n_steps`).

    Speeds count training alone, all processes together: what callbacks after this one, validations and checkpoints take
    is told as `speed/training_share`. Names: `speed/images_per_s`, `speed/training_share`, `step_time_ms/…`,
    `memory_gb/…`, and for a module whose network is an XUT `speed/tflops` and, where the device's peak is known,
    `speed/mfu`: the network's model FLOPs (arXiv 2204.02311, appendix B) over time and peak.

    Args:
        peak_tflops: dense rate of a device in 10^12 operations a second; None looks a known GPU up.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        super().__init__()
        self.peak_tflops = peak_tflops
        self.latest: dict[str, float] = {}
        self._timer: SectionTimer | None = None
        self._since = self._left = self._aside_s = 0.0
        self._since_step = self._since_samples = self._flops = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        super().on_train_start(trainer, pl_module)
        self._timer = SectionTimer(pl_module.device, self._fetching)
        self._timer.attach(trainer)
        self._since = self._left = time.perf_counter()
        self._since_step, self._since_samples = trainer.global_step, samples_trained(trainer, pl_module)
        self._aside_s, self._flops = 0.0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count what the batch will compute."""
        self._flops += batch_flops(pl_module, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Clipping and the step itself count as the optimizer's time."""
        assert self._timer is not None
        self._timer.clock.start("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act on whole steps; other callbacks come after this one."""
        assert self._timer is not None
        self._timer.clock.stop("optimizer")
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._left = time.perf_counter()

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log where Lightning does."""
        if logs_now(trainer):
            self.latest = self._speeds(trainer, module, step)
            self.latest |= {f"memory_gb/{name}": value for name, value in memory_gb(module.device).items()}
            log_now(trainer, self.latest)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the trainer its profiler back."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the trainer its profiler back."""
        self._detach()

    def _detach(self) -> None:
        if self._timer is not None:
            self._timer.detach()

    def _fetching(self) -> None:
        """All that belongs to a batch is done; from here to the next one the training waits for data."""
        now = time.perf_counter()
        self._aside_s, self._left = self._aside_s + now - self._left, now

    def _speeds(self, trainer: Trainer, module: LightningModule, step: int) -> dict[str, float]:
        assert self._timer is not None
        samples, steps = samples_trained(trainer, module), step - self._since_step
        trained, self._since_step, self._since_samples = samples - self._since_samples, step, samples
        sections = self._timer.clock.drain()  # on CUDA this waits for the device
        now = time.perf_counter()
        whole, self._since = now - self._since, now
        seconds, self._aside_s = max(whole - self._aside_s, 1e-9), 0.0
        speeds = {"speed/images_per_s": trained / seconds, "speed/training_share": seconds / whole}
        flops, self._flops = summed(torch.tensor(float(self._flops), dtype=torch.float64, device=module.device)), 0
        if flops:
            speeds["speed/tflops"] = tflops = float(flops) / seconds / 1e12
            peak = peak_tflops(module.device, self.peak_tflops)
            if peak is not None:
                speeds["speed/mfu"] = tflops / (peak * trainer.world_size)
        split = {f"step_time_ms/{name}": 1000 * spent / steps for name, spent in sections.items()}
        return {**speeds, **split, "step_time_ms/whole": 1000 * seconds / steps}


def batch_flops(module: LightningModule, batch: Any) -> int:
    """Operations of an XUT for a micro-batch of this process, forward and backward, at its true shapes; else 0."""
    config = getattr(getattr(module, "network", None), "config", None)
    if not isinstance(config, XUTConfig) or not hasattr(module, "fed_tokens"):
        return 0
    factor = module.autoencoder.factor  # type: ignore[union-attr]
    height, width = (size // factor for size in batch["image"].shape[-2:])
    text = module.fed_tokens(batch).shape[1]  # type: ignore[operator]
    rate = float(module.routing_rate)  # type: ignore[arg-type]
    return len(batch["tokens"]) * training_flops(config, (height, width), text, rate)
