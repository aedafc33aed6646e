"""What the modules of flow matching and of autoencoders share: exact counts, resuming, optimizers and clipping."""

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
    """Where a fit stands after an optimizer step.

    Attributes:
        step: optimizer steps so far.
        batches: micro-batches of this process up to that step.
        epoch_batches: those of the present epoch.
        batches_per_step: micro-batches of a step on each process.
        samples_per_batch: samples of a micro-batch, all processes together.
    """

    step: int = 0
    batches: int = 0
    epoch_batches: int = 0
    batches_per_step: int = 1
    samples_per_batch: int = 0

    def recounted(self, batches_per_step: int, samples_per_batch: int) -> "StepCounts":
        """The same place in steps where a step has other micro-batches now; the counts as they are otherwise."""
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

    def to_json(self) -> dict[str, int]:
        """Plain values, for a checkpoint."""
        return asdict(self)


def step_counts(trainer: Trainer, step: int, batches_per_step: int, samples_per_batch: int) -> StepCounts:
    """Where the fit stands, right after optimizer step number `step` was taken."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return StepCounts(
        step=step,
        batches=progress.total.ready,
        epoch_batches=progress.current.ready,
        batches_per_step=batches_per_step,
        samples_per_batch=samples_per_batch,
    )


def start_between_batches(loops: dict[str, Any], counts: StepCounts, *, validated: bool, automatic: bool) -> None:
    """Rewrite the counters of a checkpoint's `loops` in place, to stand between two batches, outside of a validation.

    Lightning saves its loops as they stand in the midst of a hook and guesses from the counters where that was. Half an
    accumulation, another number of processes or of micro-batches a step leave counters that mean another place. What is
    written here is the one place that a fit can always start from: right after an optimizer step.

    Args:
        loops: `checkpoint["loops"]`.
        counts: the place to start from.
        validated: whether a validation that is due at this step has run; else the fit begins with it.
        automatic: whether Lightning steps the optimizer, and so knows how many micro-batches make a step.
    """
    loop = loops["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    epoch_batches = 0 if _close_epoch(loop, counts) else counts.epoch_batches
    batches.update(total=_alike(counts.batches), current=_alike(epoch_batches), is_last_batch=False)
    # Lightning holds this pattern, started but not processed, for a validation that was interrupted.
    validation = _alike(0) if validated else {**_alike(0), "ready": 1, "started": 1}
    loop["epoch_loop.val_loop.batch_progress"].update(total=validation, current=dict(validation), is_last_batch=False)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = counts.step if automatic else counts.batches


def discount_empty_iteration(trainer: Trainer) -> None:
    """Call when a fit has been resumed: where a validation stands at its beginning, Lightning spends an iteration of
    its loop on running or passing it over, and counts that as a batch."""
    loop = trainer.fit_loop.epoch_loop
    if loop.restarting and trainer.fit_loop._data_fetcher and loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        loop._batches_that_stepped -= 1


def _close_epoch(loop: Mapping[str, Any], counts: StepCounts) -> bool:
    """Whether the epoch was over at the step; its counters then say so."""
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

    torchmetrics' `MeanMetric` either drops values that are not numbers, so that a broken training would look well, or
    passes over the weights (`nan_strategy="disable"`, up to 1.9).
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
        """The mean () so far."""
        return self.total / self.count


FLOAT16 = "16-mixed"
KEY = "hdm"
"""Of the position in a checkpoint."""

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class ResumableModule(LightningModule, ABC):
    """A LightningModule that knows how many samples it has been trained on, and resumes exactly from a checkpoint.

    A checkpoint saved anywhere counts up to its last optimizer step. It may be resumed on another number of processes
    and with another accumulation; rates, decays and betas are then those of the present settings, moments and the place
    in the schedule those of the checkpoint. A validation due at that step is neither lost nor repeated.

    Args:
        seed: every random draw follows from it.
        stage: name of this training among others of the same seed; every random draw follows from it too.

    Attributes:
        samples_trained: samples of this stage up to the last optimizer step, all processes together.
    """

    network: nn.Module

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
        """Micro-batches of an optimizer step on each process."""
        return self.trainer.accumulate_grad_batches

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer step: of all processes and micro-batches."""
        samples = self._samples_per_batch()
        if samples is None:
            raise RuntimeError("samples_per_step is known once a batch has been seen, or with a ShardDataModule")
        return samples * self.accumulation

    def _samples_per_batch(self) -> int | None:
        rows = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None) or self._rows
        return None if rows is None else int(rows) * self.trainer.world_size

    def log_step(self, metrics: Mapping[str, Tensor | float], rows: int, *, shown: Sequence[str] = ()) -> None:
        """Log metrics of a micro-batch of so many rows without waiting for the device.

        Lightning copies numbers to the device, and what a progress bar may show back from it, both at once: numbers are
        made there instead, and those of `shown` are shown only by a bar that wants them (see `callbacks.Progress`).
        """
        bar: Any = self.trainer.progress_bar_callback
        wanted = bar is not None and bar.is_enabled and getattr(bar, "wants_metrics", True)
        for name, value in metrics.items():
            tensor = value.detach() if torch.is_tensor(value) else self._scalar(value)
            self.log(name, tensor, prog_bar=wanted and name in shown, batch_size=rows)

    def _scalar(self, value: float) -> Tensor:
        """A number as a float32 tensor made on the device; too large a one is infinite there."""
        largest = torch.finfo(torch.float32).max
        return torch.full((), value if abs(value) <= largest else value * math.inf, device=self.device)

    def section(self, name: str) -> AbstractContextManager[Any]:
        """A part of a step under its name, for the trainer's profiler (`Trainer(profiler=…)`, `Throughput`)."""
        profiler: Any = getattr(self._attached(), "profiler", None)
        return nullcontext() if profiler is None else profiler.profile(f"[{type(self).__name__}]{name}")

    # Counting

    def setup(self, stage: str) -> None:
        """Begin to count anew, unless the same trainer continues."""
        if stage == TrainerFn.FITTING and self.trainer.global_step == 0:
            self.samples_trained, self._rows_of_step, self._counts = 0, 0, StepCounts()
            self._validated_step = None

    def note_rows(self, rows: int) -> None:
        """Take note of how many rows a training batch has on this process."""
        self._rows = self._rows or rows

    def count_batch(self, rows: int) -> None:
        """Take note of a micro-batch of so many rows on this process that the next optimizer step is made of."""
        self._rows_of_step += rows

    def count_step(self, step: int) -> None:
        """Take note of optimizer step number `step` (1 is the first) with all micro-batches since the last one."""
        self.samples_trained += self._rows_of_step * self.trainer.world_size
        self._rows_of_step = 0
        self._counts = step_counts(self.trainer, step, self.accumulation, self._samples_per_batch() or 0)

    def on_validation_epoch_start(self) -> None:
        """Begin with empty metrics: those that `Trainer.validate` has left cannot be added to outside of it."""
        for each in self.modules():
            if isinstance(each, Metric):
                each.reset()

    def on_validation_epoch_end(self) -> None:
        """Remember that this step has been validated."""
        if not self.trainer.sanity_checking:
            self._validated_step = self.trainer.global_step

    def on_train_start(self) -> None:
        """Begin with an empty step: micro-batches of one that an exception has cut short are gone."""
        self._rows_of_step = 0
        discount_empty_iteration(self.trainer)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say where in its stage this checkpoint stands, in plain values, beside what callbacks have said."""
        samples = self._samples_per_batch()
        checkpoint.setdefault(KEY, {}).update(
            stage=self.stage,
            seed=self.seed,
            step=self._counts.step,
            samples=self.samples_trained,
            batch_size=None if samples is None else samples * self.accumulation,
            counts=self._counts.to_json(),
            validated=self._validated_step == self._counts.step,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the position; for a fit also put Lightning's counters there, and keep the settings of now."""
        position = checkpoint.get(KEY)
        if position is None:
            return
        self.samples_trained = int(position["samples"])
        trainer = self._attached()
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if "optimizer_states" in checkpoint:
            keep_settings(checkpoint, *self.optimizers_and_schedules())
        saved = _saved_counts(position)
        self._counts = saved.recounted(self.accumulation, self._samples_per_batch() or saved.samples_per_batch)
        validated = position.get("validated", True)
        self._validated_step = self._counts.step if validated else None
        start_between_batches(
            checkpoint["loops"], self._counts, validated=validated, automatic=self.automatic_optimization
        )

    # Optimizers

    @abstractmethod
    def optimizers_and_schedules(self) -> list[tuple[Optimizer, LRScheduler | None]]:
        """Every optimizer with its schedule, new, as the settings of now have it."""

    def configure_optimizers(self) -> Any:
        """The optimizers, whose schedules tick once an optimizer step."""
        pairs = self.optimizers_and_schedules()
        self.schedules = [schedule for _, schedule in pairs]
        ticking = [{"scheduler": schedule, "interval": "step"} for schedule in self.schedules if schedule is not None]
        return [optimizer for optimizer, _ in pairs], ticking

    @property
    def fused(self) -> bool:
        """Whether one kernel may take a whole step; it takes scaled gradients as they are, which cannot be clipped."""
        return self.trainer.precision != FLOAT16

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and count it, before any callback sees it."""
        super().optimizer_step(*args, **kwargs)
        self.count_step(self.trainer.global_step + 1)  # Lightning counts it when this has returned

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Scale the gradients down to a norm of at most `gradient_clip_val`; None or 0 leaves them as they are.

        Lightning's own clipping refuses fused optimizers under every mixed precision, since one that takes scaled
        gradients cannot be clipped; only float16 has a scaler.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def _attached(self) -> Trainer | None:
        return self._trainer


def _saved_counts(position: Mapping[str, Any]) -> StepCounts:
    """The counts of a checkpoint; one of an older version has the step alone, and is recounted in any case."""
    saved = position.get("counts")
    return StepCounts(**saved) if saved is not None else StepCounts(step=position["step"])


def plain_learning_rate(optimizer: Optimizer, base: float) -> float:
    """The base rate as its schedule has it now: what every group's rate is a fixed share of."""
    group = optimizer.param_groups[0]
    return base * float(group["lr"]) / float(group.get("initial_lr", group["lr"]) or 1.0)


def call_optimizer(factory: OptimizerFactory, groups: list[Any], *, fused: bool) -> Optimizer:
    """The optimizer over parameter groups; where it can be fused and its factory does not say, `fused` says.

    Raises:
        UserError: it refuses a value, such as `eps`.
    """
    can = "fused" in inspect.signature(factory).parameters and "fused" not in getattr(factory, "keywords", {})
    try:
        return factory(groups, **({"fused": fused} if can else {}))
    except UserError:
        raise
    except ValueError as error:
        hint = "change the key that it names; `--explain optimizer` shows them"
        raise UserError(f"is refused: {error}", where="optimizer", hint=hint) from error
