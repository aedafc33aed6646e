"""Base of the flow-matching and autoencoder modules: exact counts, resuming, optimizers and clipping."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from hdm_lightning.errors import UserError
from hdm_lightning.training.optimization.moments import keep_settings

_STATES = ("ready", "started", "processed", "completed")


@dataclass(frozen=True)
class StepCounts:
    """The progress of a fit after an optimizer step.

    Attributes:
        step: optimizer steps so far.
        batches: micro-batches of this process up to that step.
        epoch_batches: micro-batches of the current epoch.
        batches_per_step: micro-batches per step on each process.
        samples_per_batch: samples per micro-batch, all processes together.
    """

    step: int = 0
    batches: int = 0
    epoch_batches: int = 0
    batches_per_step: int = 1
    samples_per_batch: int = 0

    def recounted(self, batches_per_step: int, samples_per_batch: int) -> "StepCounts":
        """Return the counts at the same optimizer step, converted to this number and size of micro-batches."""
        if (self.batches_per_step, self.samples_per_batch) == (batches_per_step, samples_per_batch):
            return self
        steps_of_epoch = -(-self.epoch_batches // self.batches_per_step)
        return StepCounts(
            self.step,
            self.step * batches_per_step,
            steps_of_epoch * batches_per_step,
            batches_per_step,
            samples_per_batch,
        )


def start_between_batches(loops: dict[str, Any], counts: StepCounts, *, validated: bool, automatic: bool) -> None:
    """Rewrite the counters of a checkpoint's `loops` in place, so that the fit starts between two batches.

    Lightning saves its loops in the middle of a hook and infers from the counters where that was. After part of an
    accumulation, or with another number of processes or micro-batches per step, the counters mean another place. This
    function sets the one place from which a fit can always start: right after an optimizer step.

    Args:
        loops: `checkpoint["loops"]`.
        counts: the place to start from.
        validated: whether a validation that is due at this step has run; if not, the fit starts with it.
        automatic: whether Lightning steps the optimizer, and so knows the number of micro-batches per step.
    """
    loop = loops["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    epoch_batches = 0 if _close_epoch(loop, counts) else counts.epoch_batches
    batches.update(total=_alike(counts.batches), current=_alike(epoch_batches), is_last_batch=False)
    # Lightning takes this pattern, started but not processed, for an interrupted validation.
    validation = _alike(0) if validated else {**_alike(0), "ready": 1, "started": 1}
    loop["epoch_loop.val_loop.batch_progress"].update(total=validation, current=dict(validation), is_last_batch=False)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = counts.step if automatic else counts.batches


def discount_empty_iteration(trainer: Trainer) -> None:
    """Correct the batch count of a resumed fit that starts with a validation: Lightning spends an iteration of its
    loop on running or skipping it, and counts that as a batch."""
    loop = trainer.fit_loop.epoch_loop
    if loop.restarting and trainer.fit_loop._data_fetcher and loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        loop._batches_that_stepped -= 1


def _close_epoch(loop: Mapping[str, Any], counts: StepCounts) -> bool:
    """Return whether the epoch had ended at the step; if so, mark it as completed."""
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    current = epochs["current"]
    last = batches["is_last_batch"] and batches["current"]["ready"] == counts.epoch_batches
    if current["processed"] < current["ready"] and not last:
        return False
    for each in (epochs["total"], current):
        each["processed"] = each["completed"] = each["ready"]
    return True


def _alike(count: int) -> dict[str, int]:
    return dict.fromkeys(_STATES, count)


class WeightedMean(Metric):
    """Σ weight·value / Σ weight, summed over processes.

    torchmetrics' `MeanMetric` either drops NaN values, which would make a broken training look healthy, or ignores the
    weights (`nan_strategy="disable"`, up to 1.9).
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        """Add values (B,) with weights (B,)."""
        self.total += (value.float() * weight).sum()
        self.count += weight.sum()

    def compute(self) -> Tensor:
        """Return the mean () so far."""
        return self.total / self.count


FLOAT16 = "16-mixed"
KEY = "hdm"
"""Key of the position in a checkpoint."""

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class ResumableModule(LightningModule, ABC):
    """A LightningModule that counts the samples it has been trained on, and resumes exactly from a checkpoint.

    A checkpoint, wherever it is saved, counts up to its last optimizer step. It can be resumed on another number of
    processes and with another accumulation; rates, decays and betas then come from the current settings, moments and
    the position in the schedule from the checkpoint. A validation due at that step is neither lost nor repeated.

    Args:
        seed: with the stage, determines every random draw.
        stage: name of this training, which separates its random draws from others with the same seed.

    Attributes:
        samples_trained: samples of this stage up to the last optimizer step, all processes together.
    """

    network: nn.Module
    learning_rate: float
    optimizer_factory: OptimizerFactory
    scheduler_factory: SchedulerFactory | None

    def __init__(self, *, seed: int, stage: str) -> None:
        super().__init__()
        self.seed, self.stage = seed, stage
        self.samples_trained = 0
        self._rows_of_step = 0
        self._rows: int | None = None
        self._counts = StepCounts()
        self._validated_step: int | None = None
        self.schedules: list[LRScheduler | None] = []

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each process."""
        return self.trainer.accumulate_grad_batches

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step, over all processes and micro-batches."""
        samples = self._samples_per_batch()
        if samples is None:
            raise RuntimeError("samples_per_step is only known after the first batch, or with a ShardDataModule")
        return samples * self.accumulation

    def _samples_per_batch(self) -> int | None:
        rows = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None) or self._rows
        return None if rows is None else int(rows) * self.trainer.world_size

    def log_step(self, metrics: Mapping[str, Tensor | float], rows: int, *, shown: Sequence[str] = ()) -> None:
        """Log the metrics of a micro-batch of `rows` samples without waiting for the device.

        Lightning's copies of numbers to the device, and of progress-bar metrics back from it, would block. So numbers
        are created on the device, and `shown` go only to a bar that wants them (see `callbacks.progress_bar`).
        """
        bar: Any = self.trainer.progress_bar_callback
        wanted = bar is not None and bar.is_enabled and getattr(bar, "wants_metrics", True)
        for name, value in metrics.items():
            tensor = value.detach() if torch.is_tensor(value) else self._scalar(value)
            self.log(name, tensor, prog_bar=wanted and name in shown, batch_size=rows)

    def _scalar(self, value: float) -> Tensor:
        """Return a number as a float32 tensor created on the device; infinite if it is too large."""
        largest = torch.finfo(torch.float32).max
        return torch.full((), value if abs(value) <= largest else value * math.inf, device=self.device)

    def section(self, name: str) -> AbstractContextManager[Any]:
        """Return a context that profiles a part of a step by name (`Trainer(profiler=…)`, `Throughput`)."""
        profiler: Any = getattr(self._trainer, "profiler", None)
        return nullcontext() if profiler is None else profiler.profile(f"[{type(self).__name__}]{name}")

    # Counting

    def setup(self, stage: str) -> None:
        """Reset the counts, unless the same trainer continues."""
        if stage == TrainerFn.FITTING and self.trainer.global_step == 0:
            self.samples_trained, self._rows_of_step, self._counts = 0, 0, StepCounts()
            self._validated_step = None

    def note_rows(self, rows: int) -> None:
        """Record the number of rows of a training batch on this process."""
        self._rows = self._rows or rows

    def count_batch(self, rows: int) -> None:
        """Count a micro-batch of `rows` samples on this process toward the next optimizer step."""
        self._rows_of_step += rows

    def count_step(self, step: int) -> None:
        """Count optimizer step number `step` (the first is 1) with all micro-batches since the previous one."""
        self.samples_trained += self._rows_of_step * self.trainer.world_size
        self._rows_of_step = 0
        done = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = (done.total.ready, done.current.ready)
        self._counts = StepCounts(step, *batches, self.accumulation, self._samples_per_batch() or 0)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: what `Trainer.validate` leaves in them cannot be updated outside of it."""
        for each in self.modules():
            if isinstance(each, Metric):
                each.reset()

    def on_validation_epoch_end(self) -> None:
        """Record that this step has been validated."""
        if not self.trainer.sanity_checking:
            self._validated_step = self.trainer.global_step

    def on_train_start(self) -> None:
        """Start with no micro-batch counted: those of a step interrupted by an exception are lost."""
        self._rows_of_step = 0
        discount_empty_iteration(self.trainer)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position in the stage, as plain values, to what callbacks have stored under the same key."""
        samples = self._samples_per_batch()
        checkpoint.setdefault(KEY, {}).update(
            stage=self.stage,
            seed=self.seed,
            step=self._counts.step,
            samples=self.samples_trained,
            batch_size=None if samples is None else samples * self.accumulation,
            counts=asdict(self._counts),
            validated=self._validated_step == self._counts.step,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the position; for a fit also set Lightning's counters to it, and keep the current settings."""
        position = checkpoint.get(KEY)
        if position is None:
            return
        self.samples_trained = int(position["samples"])
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if "optimizer_states" in checkpoint:
            keep_settings(checkpoint, *self.optimizers_and_schedules())
        # An older version has only the step, and is always recounted.
        saved = StepCounts(**(position.get("counts") or {"step": position["step"]}))
        self._counts = saved.recounted(self.accumulation, self._samples_per_batch() or saved.samples_per_batch)
        validated = position.get("validated", True)
        self._validated_step = self._counts.step if validated else None
        start_between_batches(
            checkpoint["loops"], self._counts, validated=validated, automatic=self.automatic_optimization
        )

    # Optimizers

    @abstractmethod
    def parameter_groups(self) -> list[Any]:
        """Return the network's trained parameters in groups, each with its learning rate and weight decay."""

    def optimizers_and_schedules(self) -> list[tuple[Optimizer, LRScheduler | None]]:
        """Create every optimizer with its schedule from the current settings; here the one of `parameter_groups`."""
        optimizer = call_optimizer(self.optimizer_factory, [*self.parameter_groups()], fused=self.fused)
        return [scheduled(optimizer, self.scheduler_factory)]

    @property
    def current_learning_rate(self) -> float:
        """The base learning rate at this point of its schedule; all groups' rates are multiples of it."""
        group = self.trainer.optimizers[0].param_groups[0]
        return self.learning_rate * float(group["lr"]) / float(group.get("initial_lr", group["lr"]) or 1.0)

    def configure_optimizers(self) -> Any:
        """Return the optimizers, with schedules that are stepped once per optimizer step."""
        pairs = self.optimizers_and_schedules()
        self.schedules = [schedule for _, schedule in pairs]
        ticking = [{"scheduler": schedule, "interval": "step"} for schedule in self.schedules if schedule is not None]
        return [optimizer for optimizer, _ in pairs], ticking

    @property
    def fused(self) -> bool:
        """Whether optimizers may be fused; not in float16, where they take scaled gradients that cannot be clipped."""
        return self.trainer.precision != FLOAT16

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and count it, before any callback sees it."""
        super().optimizer_step(*args, **kwargs)
        self.count_step(self.trainer.global_step + 1)  # Lightning counts it after this returns

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the gradient norm to `gradient_clip_val`; None or 0 means no clipping.

        Lightning's own clipping rejects fused optimizers under every mixed precision, since the scaled gradients they
        take cannot be clipped; but only float16 scales gradients.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)


def scheduled(optimizer: Optimizer, factory: SchedulerFactory | None) -> tuple[Optimizer, LRScheduler | None]:
    """Return the optimizer with its schedule, if there is one."""
    return optimizer, None if factory is None else factory(optimizer)


def call_optimizer(factory: OptimizerFactory, groups: list[Any], *, fused: bool) -> Optimizer:
    """Create the optimizer over parameter groups; `fused` is passed if the factory takes it and does not set it.

    Raises:
        UserError: the optimizer rejects a value, such as `eps`.
    """
    can = "fused" in inspect.signature(factory).parameters and "fused" not in getattr(factory, "keywords", {})
    try:
        return factory(groups, **({"fused": fused} if can else {}))
    except UserError:
        raise
    except ValueError as error:
        hint = "change the setting that the message names; `--explain optimizer` shows all of them"
        raise UserError(f"a setting was rejected: {error}", where="optimizer", hint=hint) from error
