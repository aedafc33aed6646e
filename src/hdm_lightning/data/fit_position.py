"""Position in the training stream of a running fit, from the counts of its trainer and module."""

from dataclasses import dataclass
from typing import Any

from lightning import LightningModule, Trainer


@dataclass(frozen=True)
class FitPosition:
    """The position and the counts at the time when a fit asked for its first batch."""

    trainer: Trainer
    first: int
    batches: int
    """The trainer's count of micro-batches on each rank."""
    trained: int | None
    """`samples_trained` of the module, None if it has none."""

    @classmethod
    def of(cls, trainer: Trainer, first: int) -> "FitPosition":
        """Record a fit that is about to begin at position `first`."""
        return cls(trainer, first, _counts(trainer).total.processed, _samples_trained(trainer.lightning_module))

    def position(self, samples_per_batch: int) -> int:
        """Return the current position, with `samples_per_batch` samples per micro-batch over all ranks."""
        if self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return self.first
        trained = _samples_trained(self.trainer.lightning_module)
        if trained is not None and self.trained is not None:
            return self.first + trained - self.trained
        return self.first + self._batches_stepped() * samples_per_batch

    def _batches_stepped(self) -> int:
        """Return the number of this fit's micro-batches whose gradients were part of a step."""
        progress = _counts(self.trainer)
        done, current = progress.total.processed - self.batches, progress.current.processed
        at_end = current >= self.trainer.num_training_batches or (
            progress.is_last_batch and current == progress.current.ready
        )
        if at_end:  # Lightning steps at the end of an epoch, however few micro-batches were accumulated
            return done
        return done - min(done, current % self.trainer.accumulate_grad_batches)


def _counts(trainer: Trainer) -> Any:
    """Return the trainer's count of micro-batches, in the current epoch and in total."""
    return trainer.fit_loop.epoch_loop.batch_progress


def _samples_trained(module: LightningModule | None) -> int | None:
    value = getattr(module, "samples_trained", None)
    return value if isinstance(value, int) else None
