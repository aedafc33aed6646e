"""Check that enough samples of a training and its validations could be used."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.steps import StepWatcher
from hdm_lightning.training.run_log import say
from hdm_lightning.training.strategies.processes import rank, summed
from hdm_lightning.whole_files import read_lines

EARLY_SAMPLES = 16
"""This many unusable samples in a row are an error."""
_VERIFY = "run `hdm-shards verify --decode --mark` on the shards to report what is wrong and leave bad samples out"


class UsableSamples(StepWatcher, Callback):
    """Raises a `UserError` on every process if no sample is usable, or too many samples of a fit were bad.

    A sample that cannot be used is masked: it has weight 0. Without this check, a stage too short for the reader to
    give up could end normally without one usable sample. Checks early in a fit, at every checkpoint and validation, and
    at the end. Reads the batches' `weight`; batches without it are ignored. Put it first.

    Args:
        largest_share: largest share of bad samples in a fit; None for `max_bad_share` of the `ShardDataModule`.
    """

    state_key = "UsableSamples"

    def __init__(self, largest_share: float | None = None) -> None:
        self.largest_share = largest_share
        self.seen = self.bad = 0
        self._pending: Tensor | None = None
        self._validated: Tensor | None = None
        self._early = self._useless = 0

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts of the early check."""
        super().on_train_start(trainer, pl_module)
        self._pending, self._early, self._useless = None, 0, 0

    def on_micro_batch(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any) -> None:
        """Count a micro-batch, on the device."""
        self._pending = _counted(self._pending, batch)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Check the first few samples of the fit."""
        if self._early < EARLY_SAMPLES:
            self._early += self.look(trainer)

    def look(self, trainer: Trainer) -> int:
        """Add up the samples since the last call, and return their number; all processes must call this together.

        Raises:
            UserError: none of the latest EARLY_SAMPLES or more samples could be used.
        """
        seen, bad = self._take()
        self._useless = self._useless + seen if seen == bad else 0
        if self._useless >= EARLY_SAMPLES:
            what = f"none of {self._useless} consecutive samples could be used{_reasons(trainer)}"
            raise UserError(what, where="data.train", hint=_VERIFY)
        return seen

    def _take(self) -> tuple[int, int]:
        """Return the samples since the last call, and how many of them were bad, over all processes."""
        if self._pending is None:
            return 0, 0
        seen, bad = (int(count) for count in summed(self._pending).tolist())
        self.seen, self.bad, self._pending = self.seen + seen, self.bad + bad, None
        return seen, bad

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the whole fit.

        Raises:
            UserError: no sample could be used, or too many were bad.
        """
        self._take()
        if not self.bad:
            return
        told, share = f"{self.bad} of {self.seen} samples of the training could not be used", self._share(trainer)
        if self.bad == self.seen:
            raise UserError(f"{told}{_reasons(trainer)}", where="data.train", hint=_VERIFY)
        if self.bad > share * self.seen:
            what = f"{told}, more than {share:.1%}{_reasons(trainer)}"
            raise UserError(what, where="data.max_bad_share", hint=f"{_VERIFY}; or raise data.max_bad_share")
        if rank() == 0:
            say(f"{told}{_reasons(trainer)}")

    def _share(self, trainer: Trainer) -> float:
        if self.largest_share is not None:
            return self.largest_share
        return float(getattr(_stream(trainer), "max_bad_share", 1.0))

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the validation's counts."""
        self._validated = None
        self.look(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *place: Any) -> None:
        """Count a batch, on the device."""
        self._validated = _counted(self._validated, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the validation set.

        Raises:
            UserError: none of its samples could be used.
        """
        if self._validated is None:
            return
        seen, bad = (int(count) for count in summed(self._validated).tolist())
        self._validated = None
        if bad == seen:
            what = f"none of the validation samples could be used{_reasons(trainer)}"
            hint = f"{_VERIFY}; or set validation.samples=0 to train without validation"
            raise UserError(what, where="data.validation", hint=hint)

    # Checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check, and save the counts."""
        self.look(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far."""
        return {"seen": self.seen, "bad": self.bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.seen, self.bad = int(state_dict["seen"]), int(state_dict["bad"])


def _counted(before: Tensor | None, batch: Any) -> Tensor | None:
    """Return the numbers of samples and of masked ones, float64 (2,) on their device, with those of a batch added."""
    weight = batch.get("weight") if isinstance(batch, Mapping) else None
    if weight is None:
        return before
    masked = (weight == 0).sum()
    counts = torch.stack([torch.full_like(masked, weight.numel()), masked]).double()
    return counts if before is None else before + counts


def _stream(trainer: Trainer) -> Any:
    return getattr(getattr(trainer, "datamodule", None), "training_stream", None)


def _reasons(trainer: Trainer) -> str:
    """Return the most common reasons in the quarantine file, if there is one."""
    kept = getattr(_stream(trainer), "quarantine", None)
    if kept is None:
        return ""
    found = Counter(str(line.get("reason", "")).partition(":")[0] for line in read_lines(Path(kept)))
    return ": " + ", ".join(f"{reason} ({count})" for reason, count in found.most_common(3)) if found else ""
