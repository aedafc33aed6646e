"""Checkpoints that are either the old one or the new one, never half of one."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from hdm_lightning.whole_files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes into a temporary file of the target folder, syncs it, and moves it over the name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save `checkpoint` under `path`; a crash or a full disk leaves what was there before."""
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))
