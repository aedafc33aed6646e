"""Checkpoints that are either the old one or the new one, never half of one; read, checked and set aside."""

import errno
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from hdm_lightning.errors import UserError

NETWORK_PREFIX = "network."
PATTERN = re.compile(r"step-(\d{8})\.ckpt")
DAMAGED = ".damaged"


class AtomicCheckpointIO(TorchCheckpointIO):
    """A plugin of `lightning.Trainer`: writes into a temporary file of the target folder, syncs it, and moves it.

    What it reads is checked against the checksums that torch writes into every file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save `checkpoint` under `path`; a crash or a full disk leaves what was there before."""
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            UserError: the file is damaged.
        """
        if Path(path).exists() and not is_whole(Path(path)):
            hint = "take the one before it, or let resume=auto find it"
            raise UserError("the checkpoint is damaged", where=str(path), hint=hint)
        return super().load_checkpoint(path, *args, **kwargs)


def write_atomically(path: Path, write: Any) -> None:
    """Let `write(file)` fill a temporary file beside `path`, then put it in place of `path`.

    Raises:
        UserError: when the disk is full; the old file is intact and the temporary one removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full_error(path) from error
        raise
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def disk_full_error(path: Path | str) -> UserError:
    """What to say when `path` could not be written because the disk, a quota or a size limit is reached."""
    return UserError(
        "the disk is full; what was there before is intact",
        where=str(path),
        hint="free space or set run_dir to another disk, then run the same command again",
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that a disk, a quota or a limit of file sizes is reached."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # torch's zip writer reports a short write as a RuntimeError about the stream's position.
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "unexpected pos" in str(error))


# Reading


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint after `step` optimizer steps."""
    return folder / f"step-{step:08d}.ckpt"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a training, oldest first; those that were set aside are left out."""
    return sorted(path for path in folder.glob("step-*.ckpt") if PATTERN.fullmatch(path.name))


def is_whole(path: Path) -> bool:
    """Whether a file that torch has saved is as it was written: a zip file with a checksum for every tensor.

    torch itself looks at no checksum when it loads.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, EOFError):
        return False


def set_aside_damaged(folder: Path) -> list[Path]:
    """Rename the newest checkpoints of a folder as long as they are damaged; returns their new names.

    The newest one that is whole then is the last of `checkpoints_in`. Older ones are not looked at.
    """
    renamed = []
    for path in reversed(checkpoints_in(folder)):
        if is_whole(path):
            break
        renamed.append(path.rename(path.with_name(path.name + DAMAGED)))
    return renamed


def read_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """A training checkpoint, loaded without running any code it might hold.

    Args:
        path: the file.
        lazily: leave the tensors on disk until they are used; their memory is shared by the processes of a machine and
            given up where it is short.
    """
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    return loaded


def network_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's own state dict out of a training checkpoint."""
    state = checkpoint["state_dict"]
    return {
        name.removeprefix(NETWORK_PREFIX): value for name, value in state.items() if name.startswith(NETWORK_PREFIX)
    }


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
