"""Training scalars on one axis: samples seen since the start of the schedule."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.flow_module import FlowMatchingModule
from hdm_lightning.training.monitoring.data_counts import DataCounts
from hdm_lightning.training.monitoring.memory_use import memory_gb
from hdm_lightning.training.monitoring.tensorboard import time_bin_tag
from hdm_lightning.training.monitoring.throughput import peak_tflops, training_flops
from hdm_lightning.training.processes import summed
from hdm_lightning.training.sharding import total_norm


def samples_seen(trainer: Trainer) -> int:
    """Samples seen since the start of the schedule."""
    module = trainer.lightning_module
    assert isinstance(module, FlowMatchingModule)
    return module.plan.samples_before + trainer.global_step * module.plan.settings.batch_size


def log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Write metrics to every logger at the present number of samples."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=samples_seen(trainer))


class LogScalars(StepWatcher, Callback):
    """Losses, rates, norms, speed, memory, data counts and the split of a step's time, every so many optimizer steps.

    Speeds count the time of training alone: what callbacks after this one take (validation, pictures, saving) is
    told as `speed/training_share`.

    Args:
        every: optimizer steps between two entries.
        data: counts of the stage's data, or None.
        peak_tflops: the device's peak rate for the utilisation, None to look it up.
    """

    def __init__(self, every: int, data: DataCounts | None = None, peak_tflops: float | None = None) -> None:
        super().__init__()
        self.every = every
        self.data = data
        self.configured_peak = peak_tflops
        self.latest: dict[str, float] = {}
        self._gradient_norm: torch.Tensor | None = None
        self._since = self._left = 0.0
        self._since_step = 0
        self._aside_s = 0.0
        self._flops = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        super().on_train_start(trainer, pl_module)
        self._since, self._since_step = time.perf_counter(), trainer.global_step
        self._left, self._aside_s, self._flops = self._since, 0.0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The wait for data is over; count what the batch will compute."""
        assert isinstance(pl_module, FlowMatchingModule)
        pl_module.clock.end_wait()
        self._aside_s += max(0.0, (pl_module.clock.waiting_since or self._left) - self._left)
        self._flops += batch_flops(pl_module, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Gradient norm before clipping, only where it will be written."""
        if due(trainer.global_step + 1, self.every, trainer.max_steps):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._gradient_norm = total_norm(gradients)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act on whole steps; other callbacks come after this one."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._left = time.perf_counter()

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Write where due."""
        assert isinstance(module, FlowMatchingModule)
        module.clock.stop("optimizer")  # what the callbacks after this one do is no part of the step
        if due(step, self.every, last_step(trainer)):
            self.latest = self._collect(trainer, module, step)
            log(trainer, self.latest)

    def state_dict(self) -> dict[str, Any]:
        """The holes so far, which no plan can tell."""
        return {"holes": self.data.holes if self.data else 0.0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        if self.data is not None:
            self.data.holes = float(state_dict["holes"])

    def _collect(self, trainer: Trainer, module: FlowMatchingModule, step: int) -> dict[str, float]:
        steps, self._since_step = step - self._since_step, step
        samples = steps * module.plan.settings.batch_size
        metrics = self._losses(module, samples)
        metrics["optimizer/learning_rate_factor"] = self._rate_factor(trainer)
        if self._gradient_norm is not None:
            metrics["optimizer/gradient_norm"] = float(self._gradient_norm)
            self._gradient_norm = None  # a stage that ends early has none of its last step
        weights = [p.detach() for p in module.network.parameters()]
        metrics["optimizer/weight_norm"] = float(total_norm(weights))
        metrics |= self._speeds(module, samples, steps)
        metrics |= {f"memory_gb/{name}": value for name, value in memory_gb(module.device).items()}
        if self.data is not None:
            metrics |= self.data.metrics(step * module.plan.settings.batch_size)
        return metrics

    def _speeds(self, module: FlowMatchingModule, samples: int, steps: int) -> dict[str, float]:
        now = time.perf_counter()
        whole, self._since = now - self._since, now
        seconds, self._aside_s = max(whole - self._aside_s, 1e-9), 0.0
        flops, self._flops = summed(torch.tensor(float(self._flops), dtype=torch.float64, device=module.device)), 0
        tflops = float(flops) / seconds / 1e12
        speeds = {
            "speed/images_per_s": samples / seconds,
            "speed/training_share": seconds / whole,
            "speed/tflops": tflops,
        }
        peak = peak_tflops(module.device, self.configured_peak)
        if peak is not None:
            speeds["speed/mfu"] = tflops / (peak * module.plan.world_size)
        speeds |= {f"step_time_ms/{name}": 1000 * spent / steps for name, spent in module.clock.drain().items()}
        return {**speeds, "step_time_ms/whole": 1000 * seconds / steps}

    def _losses(self, module: FlowMatchingModule, samples: int) -> dict[str, float]:
        assert module.time_bins is not None
        sums, counts = summed(module.time_bins.packed()).tolist()
        module.time_bins.reset()
        if self.data is not None:
            self.data.holes += samples - sum(counts)
        bins = len(sums)
        losses = {"loss/train": sum(sums) / max(sum(counts), 1e-9)}
        for number, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                losses[time_bin_tag(number, bins)] = total / count
        return losses

    def _rate_factor(self, trainer: Trainer) -> float:
        group = trainer.optimizers[0].param_groups[0]
        return float(group["lr"] / group["initial_lr"])


def batch_flops(module: FlowMatchingModule, batch: dict[str, Any]) -> int:
    """Operations of the network for a micro-batch of this process, forward and backward, at its true shapes."""
    factor = module.encoders.autoencoder.factor
    height, width = (size // factor for size in batch["image"].shape[-2:])
    text = module.fed_tokens(batch).shape[1]
    rate = module.plan.settings.routing_rate
    return len(batch["tokens"]) * training_flops(module.network.config, (height, width), text, rate)
