"""What a training has seen of its data: samples, passes, masked and quarantined samples."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.training.callbacks.steps import StepWatcher, log_now, logs_now
from hdm_lightning.training.strategies.processes import summed

OLD_KEY = "LogScalars"


class DataSeen(StepWatcher, Callback):
    """Logs `seen/samples`, `seen/passes`, `seen/masked` and `seen/quarantined` where Lightning logs.

    Passes are told where the data module has a `train_plan`. A masked sample could not be used and counted for nothing
    (the batch's `weight` is 0).

    Args:
        quarantine: the data's file of bad samples, one a line, or None.
    """

    def __init__(self, quarantine: Path | str | None = None) -> None:
        super().__init__()
        self.quarantine = None if quarantine is None else QuarantineCount(Path(quarantine))
        self.masked = 0.0
        self._since: Tensor | None = None

    @property
    def state_key(self) -> str:
        """A fixed name in the checkpoint."""
        return "DataSeen"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        super().on_train_start(trainer, pl_module)
        self._since = torch.zeros((), device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the micro-batch's masked samples, on the device."""
        assert self._since is not None
        self._since += (1 - batch["weight"]).sum()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log where Lightning does."""
        if not logs_now(trainer):
            return
        self._add_up()
        samples = int(getattr(module, "samples_trained", 0))
        metrics = {"seen/samples": float(samples), "seen/masked": self.masked}
        plan = getattr(getattr(trainer, "datamodule", None), "train_plan", None)
        if plan is not None:
            metrics["seen/passes"] = samples / plan.samples
        if self.quarantine is not None:
            metrics["seen/quarantined"] = float(self.quarantine.count())
        log_now(trainer, metrics)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the count, which nothing else tells."""
        self._add_up()
        checkpoint["callbacks"][self.state_key] = {"masked": self.masked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.masked = float(state_dict["masked"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the count of an older version's checkpoint."""
        states = checkpoint["callbacks"]
        if OLD_KEY in states:
            states.setdefault(self.state_key, {"masked": states[OLD_KEY]["holes"]})

    def _add_up(self) -> None:
        if self._since is not None:
            self.masked += float(summed(self._since))
            self._since.zero_()


class QuarantineCount:
    """Different bad samples in a growing file, each line of which is read once.

    Args:
        path: of the file; the same sample may be written once by every reader.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[bytes] = set()
        self._read = 0

    def count(self) -> int:
        """How many there are now."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._read += len(whole)
            self._known |= {line.rpartition(b'"index"')[0] for line in whole.splitlines()}
        return len(self._known)
