"""Checkpoints that are either the old one or the new one, never half of one."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from hdm_lightning.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes into a temporary file of the target folder, syncs it, and moves it over the name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save `checkpoint` under `path`; a crash or a full disk leaves what was there before."""
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


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
    """What to tell when `path` could not be written because the disk, a quota or a size limit is reached."""
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
