"""Where the training stream of a running fit stands, by what its trainer and module have counted."""

from dataclasses import dataclass
from typing import Any

from lightning import LightningModule, Trainer


@dataclass(frozen=True)
class FitPosition:
    """Where the stream and the counters stood when a fit asked for its first batch."""

    trainer: Trainer
    first: int
    batches: int
    """Micro-batches that the trainer had counted on each rank."""
    trained: int | None
    """`samples_trained` of the module, where it has one."""

    @classmethod
    def of(cls, trainer: Trainer, first: int) -> "FitPosition":
        """A fit that is about to begin at a position."""
        return cls(trainer, first, _counts(trainer).total.processed, _samples_trained(trainer.lightning_module))

    def position(self, samples_per_batch: int) -> int:
        """Where the stream stands now, a micro-batch having so many samples over all ranks."""
        if self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return self.first
        trained = _samples_trained(self.trainer.lightning_module)
        if trained is not None and self.trained is not None:
            return self.first + trained - self.trained
        return self.first + self._batches_stepped() * samples_per_batch

    def _batches_stepped(self) -> int:
        """Micro-batches of this fit whose gradients have gone into a step."""
        progress = _counts(self.trainer)
        done, current = progress.total.processed - self.batches, progress.current.processed
        at_end = current >= self.trainer.num_training_batches or (
            progress.is_last_batch and current == progress.current.ready
        )
        if at_end:  # Lightning steps at the end of an epoch, however few micro-batches have gathered
            return done
        return done - min(done, current % self.trainer.accumulate_grad_batches)


def _counts(trainer: Trainer) -> Any:
    """The trainer's count of micro-batches: of the present epoch, and in total."""
    return trainer.fit_loop.epoch_loop.batch_progress


def _samples_trained(module: LightningModule | None) -> int | None:
    value = getattr(module, "samples_trained", None)
    return value if isinstance(value, int) else None
