"""Lightning's counters in a checkpoint, put where they stand between two batches and outside of a validation.

Lightning saves its loops as they stand in the midst of a hook and guesses from the counters where that was. Half an
accumulation, another number of processes or of micro-batches a step leave counters that mean another place. These
functions write the one place that a fit can always start from: right after an optimizer step.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer

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
    """Rewrite the counters of a checkpoint's `loops` in place.

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
