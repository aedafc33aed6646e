"""Write checkpoints atomically; read and verify them, and set damaged ones aside.

A checkpoint is a zip file with a CRC-32 checksum for each record. PyTorch's reader ignores the checksums, so it would
load a bit that has flipped on disk; here they are compared.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from hdm_lightning.errors import UserError, first_line
from hdm_lightning.interop.tensor_files import require_modest_pickle
from hdm_lightning.regular_files import open_regular
from hdm_lightning.training.run_log import say
from hdm_lightning.whole_files import write_atomically

NETWORK_PREFIX = "network."
PATTERN = re.compile(r"step-(\d{8})\.ckpt")
DAMAGED = ".damaged"
"""Suffix of a damaged checkpoint."""
_PARTS = ("hdm", "state_dict", "callbacks")


class DamagedCheckpoint(UserError):
    """A training checkpoint that cannot be read.

    Attributes:
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        hint = "use another checkpoint of the run; `hdm-train` itself resumes from the newest intact one"
        super().__init__(f"is damaged: {reason}", where=str(path), hint=hint)
        self.reason = reason


class AtomicCheckpointIO(TorchCheckpointIO):
    """A `lightning.Trainer` plugin that writes a temporary file in the target folder, syncs it, and renames it.

    Loading compares the checksums that torch writes into every file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save `checkpoint` to `path`; after a crash or on a full disk the old file is intact."""
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            DamagedCheckpoint: the file is damaged.
        """
        if Path(path).exists():
            compare_checksums(Path(path))
        # A device name: with Lightning's default function, low-bit moments, a tensor subclass, cannot be loaded.
        if not args:
            kwargs.setdefault("map_location", "cpu")
        return super().load_checkpoint(path, *args, **kwargs)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint after `step` optimizer steps."""
    return folder / f"step-{step:08d}.ckpt"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a training, oldest first, without those that were set aside."""
    return sorted(path for path in folder.glob("step-*.ckpt") if PATTERN.fullmatch(path.name))


def read_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Load a training checkpoint without running any code that it may contain.

    Args:
        path: the file.
        lazily: leave the tensors on disk until they are used; processes on a machine share their memory, and the system
            can reclaim it.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            if not zipfile.is_zipfile(file):
                raise DamagedCheckpoint(path, "it is cut off, or not a checkpoint at all")
            require_modest_pickle(file)
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except pickle.UnpicklingError as error:  # its message advises loading it anyway
        raise DamagedCheckpoint(path, "it contains more than plain data, or is cut off") from error
    except DamagedCheckpoint:  # a ValueError, like every UserError
        raise
    except OSError as error:
        raise DamagedCheckpoint(path, error.strerror or "it cannot be read") from error
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError) as error:
        raise DamagedCheckpoint(path, first_line(error, 160)) from error
    return loaded


def read_parts(path: Path) -> dict[str, Any]:
    """Load a training checkpoint that must be complete and match the step in its name; compares no checksums.

    Raises:
        DamagedCheckpoint: it is incomplete, or of another step.
    """
    checkpoint = read_checkpoint(path, lazily=True)
    lacking = [key for key in _PARTS if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict))]
    if lacking:
        raise DamagedCheckpoint(path, f"it lacks {', '.join(lacking)}")
    named, step = PATTERN.fullmatch(path.name), checkpoint["hdm"].get("step")
    if not isinstance(step, int):
        raise DamagedCheckpoint(path, "it has no step")
    if named is not None and int(named[1]) != step:
        raise DamagedCheckpoint(path, f"it is from step {step}")
    return checkpoint


def read_intact(path: Path) -> dict[str, Any]:
    """Load a training checkpoint and compare all checksums; tensors stay on disk until they are used.

    Raises:
        DamagedCheckpoint: it is damaged, or from another step than its name says.
    """
    checkpoint = read_parts(path)
    compare_checksums(path)
    return checkpoint


def is_intact(path: Path) -> bool:
    """Return whether a checkpoint can be resumed from; a damaged one is set aside and reported."""
    try:
        read_intact(path)
    except DamagedCheckpoint as damage:
        set_aside(path, damage.reason)
        return False
    return True


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged checkpoint, so that it is kept but not resumed from, and report it."""
    aside = path.with_name(path.name + DAMAGED)
    path.replace(aside)
    earlier = any(other.name < path.name for other in checkpoints_in(path.parent))
    then = "trying the one before it" if earlier else "and there is none before it"
    say(f"{path} is damaged ({reason}): kept as {aside.name}, {then}")


def require_some(folder: Path) -> None:
    """Refuse a folder whose checkpoints have all been set aside: starting over must be the user's decision.

    Raises:
        UserError: naming the folder and the ways out.
    """
    damaged = sorted(folder.glob(f"step-*{DAMAGED}"))
    if damaged and not checkpoints_in(folder):
        raise UserError(
            f"all checkpoints are damaged ({', '.join(path.name for path in damaged)})",
            where=str(folder),
            hint="restore an intact copy of one under its old name, or delete the folder to start the stage over",
        )


def compare_checksums(path: Path) -> None:
    """Compare each record of a file saved by torch with the checksum stored beside it.

    Raises:
        DamagedCheckpoint: one differs, or the file is not a zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # a flipped bit in a header yields an impossible method, size or name
        raise DamagedCheckpoint(path, f"a header is broken: {error}") from error
    if broken is not None:
        raise DamagedCheckpoint(path, f"the checksum of {broken} is wrong")


def network_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the network's state dict from a training checkpoint."""
    state = checkpoint["state_dict"]
    return {
        name.removeprefix(NETWORK_PREFIX): value for name, value in state.items() if name.startswith(NETWORK_PREFIX)
    }
