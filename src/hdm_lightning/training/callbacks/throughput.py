"""The speed of a training: images and operations per second, breakdown of a step's time, memory."""

import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.gpus import find_gpu
from hdm_lightning.profiling.operations import training_flops
from hdm_lightning.training.callbacks.steps import StepWatcher, log_now, logs_now, samples_trained
from hdm_lightning.training.modules.flow_step import latent_grid
from hdm_lightning.training.stages import StageSettings
from hdm_lightning.training.strategies.processes import summed


def stage_flops(config: XUTConfig, stage: StageSettings, factor: int) -> int:
    """Return the operations per sample of a stage, with captions padded to the stage's context.

    `factor` is the image pixels per latent cell along one side.
    """
    side = stage.resolution // factor
    return training_flops(config, (side, side), stage.context_length, stage.routing_rate)


def peak_tflops(device: torch.device, configured: float | None) -> float | None:
    """Return the device's dense bfloat16 rate in 10^12 operations per second, as configured or known; else None."""
    if configured is not None:
        return configured
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.peak_tflops if gpu else None


STATUS = Path("/proc/self/status")
GB = 1e9


def memory_gb(device: torch.device) -> dict[str, float]:
    """Return memory in 10^9 bytes: resident `host`, `host_peak`; on CUDA also `device`, `device_peak`, `reserved`.

    `device` is allocated to tensors, `reserved` is held by the allocator.
    """
    figures = {name: size / GB for name, size in zip(("host", "host_peak"), _resident_bytes(), strict=True)}
    if device.type == "cuda":
        figures["device"] = torch.cuda.memory_allocated(device) / GB
        figures["device_peak"] = torch.cuda.max_memory_allocated(device) / GB
        figures["reserved"] = torch.cuda.memory_reserved(device) / GB
    return figures


def restart_peak(device: torch.device) -> None:
    """Count `device_peak` from now on; `host_peak` stays that of the process."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # before that, there is nothing to reset
        torch.cuda.reset_peak_memory_stats(device)


def _resident_bytes() -> tuple[int, int]:
    """Return the current and the peak resident memory; both are the peak if the system reports only that."""
    if STATUS.exists():  # getrusage's value starts at the size of the parent process
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # unit of getrusage
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak, peak


class SectionClock:
    """Adds up seconds per named section.

    On CUDA a section is timed by two events on the stream, read in `drain`; elsewhere by the host's clock.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: dict[str, float | torch.cuda.Event] = {}
        self.device = torch.device("cpu")

    def start(self, name: str) -> None:
        """Start a section."""
        self._open[name] = self._mark()

    def stop(self, name: str) -> None:
        """End a section; does nothing if it was not started."""
        begin = self._open.pop(name, None)
        if begin is None:
            return
        end = self._mark()
        if isinstance(begin, float) and isinstance(end, float):
            self._seconds[name] += end - begin
        elif isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((name, begin, end))

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time the body of a with statement."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def drain(self) -> dict[str, float]:
        """Return the seconds per section since the last call; waits for the device once."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        result, self._seconds = dict(self._seconds), defaultdict(float)
        return result

    def _mark(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


DATA = "data"
SECTIONS = {
    r"\[_TrainingEpochLoop\]\.train_dataloader_next": DATA,
    r"\[\w+\]encode_images": "vae",
    r"\[\w+\]encode_text": "text",
    r"\[\w+\]network": "xut",
    r"\[\w+\]autoencoder": "autoencoder",
    r"\[Strategy\]\w+\.backward": "backward",
}
"""Patterns of profiler actions, of Lightning and of this project's modules, and the section each counts as."""


class SectionTimer(Profiler):
    """Passes every action on to the trainer's own profiler, and adds up the seconds of those in `SECTIONS`.

    `attach` replaces the trainer's profiler with this one, `detach` restores it. Only training counts. `on_fetch` is
    called when the wait for a batch begins.
    """

    def __init__(self, device: torch.device, on_fetch: Callable[[], None]) -> None:
        super().__init__()
        self.clock = SectionClock()
        self.clock.device = device
        self.on_fetch = on_fetch
        self._inner: Any = None
        self._trainer: Any = None
        self._known: dict[str, str | None] = {}

    def attach(self, trainer: Trainer) -> None:
        """Replace the trainer's profiler."""
        self._trainer = trainer
        self._inner, self._trainer.profiler = self._trainer.profiler, self

    def detach(self) -> None:
        """Restore the trainer's profiler."""
        if self._trainer is not None:
            self._trainer.profiler = self._inner
            self._trainer = None

    def start(self, action_name: str) -> None:
        """Start an action."""
        self._inner.start(action_name)
        section = self._section(action_name)
        if section is not None:
            if section == DATA:
                self.on_fetch()
            self.clock.start(section)

    def stop(self, action_name: str) -> None:
        """End an action."""
        section = self._section(action_name)
        if section is not None:
            self.clock.stop(section)
        self._inner.stop(action_name)

    def _section(self, action_name: str) -> str | None:
        if self._trainer is None or not self._trainer.training:
            return None
        if action_name not in self._known:
            found = (section for pattern, section in SECTIONS.items() if re.fullmatch(pattern, action_name))
            self._known[action_name] = next(found, None)
        return self._known[action_name]

    def summary(self) -> str:
        """Return the summary of the trainer's own profiler."""
        return str(self._inner.summary())

    def describe(self) -> None:
        """Call the trainer's own profiler."""
        self._inner.describe()

    def teardown(self, stage: str | None) -> None:
        """Tear down the trainer's own profiler."""
        self._inner.teardown(stage)


class Throughput(StepWatcher, Callback):
    """Logs speed, memory and the breakdown of a step's time when Lightning logs (`log_every_n_steps`).

    Speeds are over training time only, all processes together: the time of callbacks after this one, validations and
    checkpoints only lowers `speed/training_share`. Names: `speed/images_per_s`, `speed/training_share`,
    `step_time_ms/…`, `memory_gb/…`, with captions `speed/padding_share` (of the text tokens fed), and for an XUT
    `speed/tflops` and, if the device's peak is known, `speed/mfu`: the network's model FLOPs (arXiv 2204.02311,
    appendix B), without those of padding, over time and peak.

    Args:
        peak_tflops: dense rate of a device in 10^12 operations per second; None looks up known GPUs.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.latest: dict[str, float] = {}
        self._timer: SectionTimer | None = None
        self._since = self._left = self._aside_s = 0.0
        self._since_step = self._since_samples = 0
        self._counts = [0, 0, 0]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        super().on_train_start(trainer, pl_module)
        self._timer = SectionTimer(pl_module.device, self._fetching)
        self._timer.attach(trainer)
        self._since = self._left = time.perf_counter()
        self._since_step, self._since_samples = trainer.global_step, samples_trained(trainer, pl_module)
        self._aside_s, self._counts = 0.0, [0, 0, 0]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch's operations and text tokens."""
        counted = (batch_flops(pl_module, batch), *text_tokens(pl_module, batch))
        self._counts = [before + more for before, more in zip(self._counts, counted, strict=True)]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Start the optimizer's time, which includes clipping."""
        assert self._timer is not None
        self._timer.clock.start("optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act on complete steps; the time of later callbacks does not count."""
        assert self._timer is not None
        self._timer.clock.stop("optimizer")
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._left = time.perf_counter()

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log when Lightning does."""
        if logs_now(trainer):
            self.latest = self._speeds(trainer, module, step)
            self.latest |= {f"memory_gb/{name}": value for name, value in memory_gb(module.device).items()}
            log_now(trainer, self.latest)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the trainer's profiler."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the trainer's profiler."""
        self._detach()

    def _detach(self) -> None:
        if self._timer is not None:
            self._timer.detach()

    def _fetching(self) -> None:
        """Count the time since the last batch as not training; from here on, the training waits for data."""
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
        counts = torch.tensor(self._counts, dtype=torch.float64, device=module.device)
        (flops, true, fed), self._counts = summed(counts).tolist(), [0, 0, 0]
        if fed:
            speeds["speed/padding_share"] = 1 - true / fed
        if flops:
            speeds["speed/tflops"] = tflops = flops / seconds / 1e12
            peak = peak_tflops(module.device, self.peak_tflops)
            if peak is not None:
                speeds["speed/mfu"] = tflops / (peak * trainer.world_size)
        split = {f"step_time_ms/{name}": 1000 * spent / steps for name, spent in sections.items()}
        return {**speeds, **split, "step_time_ms/whole": 1000 * seconds / steps}


def batch_flops(module: LightningModule, batch: Any) -> int:
    """Return an XUT's operations for this process's micro-batch, forward and backward, without padding; else 0."""
    config = getattr(getattr(module, "network", None), "config", None)
    counts = _caption_tokens(batch)
    if not isinstance(config, XUTConfig) or counts is None:
        return 0
    height, width = latent_grid(batch, module.autoencoder.factor)  # type: ignore[union-attr,arg-type]
    rate = float(module.routing_rate)  # type: ignore[arg-type]
    return sum(training_flops(config, (height, width), text, rate) for text in counts)


def text_tokens(module: LightningModule, batch: Any) -> tuple[int, int]:
    """Return the caption tokens of this process's micro-batch, without and with padding; 0 without captions."""
    counts = _caption_tokens(batch)
    if counts is None or not hasattr(module, "fed_tokens"):
        return 0, 0
    return sum(counts), module.fed_tokens(batch).numel()  # type: ignore[operator]


def _caption_tokens(batch: Any) -> list[int] | None:
    """Return the number of tokens of each caption; None for a batch without, such as a bare tensor."""
    return batch.get("caption_tokens") if isinstance(batch, Mapping) else None
