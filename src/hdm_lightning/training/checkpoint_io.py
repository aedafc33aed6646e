"""Checkpoints that are either the old one or the new one, never half of one; read, checked and set aside.

A checkpoint is a zip file whose writer sums up each record as it goes (CRC-32). PyTorch's reader never looks at the
sums, so a bit that has flipped on the disk would be trained on; here they are compared.
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
"""Ending of a checkpoint that was found damaged."""
_PARTS = ("hdm", "state_dict", "callbacks")


class DamagedCheckpoint(UserError):
    """A file that stands for a training checkpoint and cannot be read as one.

    Attributes:
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        hint = "take another checkpoint of the run; `hdm-train` itself resumes from the newest one that is whole"
        super().__init__(f"is damaged: {reason}", where=str(path), hint=hint)
        self.reason = reason


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
            DamagedCheckpoint: the file is damaged.
        """
        if Path(path).exists():
            compare_checksums(Path(path))
        # By its name: moments of few bits are a class of tensors that cannot be read with Lightning's function for it.
        if not args:
            kwargs.setdefault("map_location", "cpu")
        return super().load_checkpoint(path, *args, **kwargs)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint after `step` optimizer steps."""
    return folder / f"step-{step:08d}.ckpt"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a training, oldest first; those that were set aside are left out."""
    return sorted(path for path in folder.glob("step-*.ckpt") if PATTERN.fullmatch(path.name))


def read_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """A training checkpoint, loaded without running any code it might hold.

    Args:
        path: the file.
        lazily: leave the tensors on disk until they are used; their memory is shared by the processes of a machine and
            given up where it is short.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            if not zipfile.is_zipfile(file):
                raise DamagedCheckpoint(path, "it is cut off, or no checkpoint at all")
            require_modest_pickle(file)
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except pickle.UnpicklingError as error:  # whose message advises to load it all the same
        raise DamagedCheckpoint(path, "it holds more than plain data, or is cut off") from error
    except DamagedCheckpoint:  # a ValueError, as all of the user's errors are
        raise
    except OSError as error:
        raise DamagedCheckpoint(path, error.strerror or "it cannot be read") from error
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError) as error:
        raise DamagedCheckpoint(path, first_line(error, 160)) from error
    return loaded


def read_parts(path: Path) -> dict[str, Any]:
    """A training checkpoint with all that every one has, of the step in its name; its records are not compared.

    Raises:
        DamagedCheckpoint: it is none.
    """
    checkpoint = read_checkpoint(path, lazily=True)
    lacking = [key for key in _PARTS if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict))]
    if lacking:
        raise DamagedCheckpoint(path, f"it lacks {', '.join(lacking)}")
    named, step = PATTERN.fullmatch(path.name), step_of(checkpoint)
    if step is None:
        raise DamagedCheckpoint(path, "it names no step")
    if named is not None and int(named[1]) != step:
        raise DamagedCheckpoint(path, f"it is that of step {step}")
    return checkpoint


def step_of(checkpoint: Mapping[str, Any]) -> int | None:
    """The optimizer step that a checkpoint was written after; None where it names none."""
    noted = checkpoint.get("hdm")
    step = noted.get("step") if isinstance(noted, dict) else checkpoint.get("global_step")
    return step if isinstance(step, int) else None


def read_intact(path: Path) -> dict[str, Any]:
    """A training checkpoint whose every record is as it was written, its tensors left on disk until they are used.

    Raises:
        DamagedCheckpoint: it is not, or it is that of another step than its name says.
    """
    checkpoint = read_parts(path)
    compare_checksums(path)
    return checkpoint


def is_intact(path: Path) -> bool:
    """Whether a checkpoint can be resumed from; one that cannot is set aside, which is reported."""
    try:
        read_intact(path)
    except DamagedCheckpoint as damage:
        set_aside(path, damage.reason)
        return False
    return True


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged checkpoint, so that it is neither resumed from nor lost, and say so."""
    aside = path.with_name(path.name + DAMAGED)
    path.replace(aside)
    say(f"{path} is damaged ({reason}): kept as {aside.name}, resuming from the one before it")


def require_some(folder: Path) -> None:
    """Refuse a folder whose checkpoints have all been set aside: to begin anew must be the user's decision.

    Raises:
        UserError: naming the folder and the ways out.
    """
    damaged = sorted(folder.glob(f"step-*{DAMAGED}"))
    if damaged and not checkpoints_in(folder):
        raise UserError(
            f"no checkpoint is left that is not damaged ({', '.join(path.name for path in damaged)})",
            where=str(folder),
            hint="put a copy of one there under its old name, or delete the folder to begin the stage anew",
        )


def compare_checksums(path: Path) -> None:
    """Compare each record of a file that torch has saved with the sum that was written beside it.

    Raises:
        DamagedCheckpoint: one differs, or the file is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # a flipped bit in a header is read as a method, a size or a name that cannot be
        raise DamagedCheckpoint(path, f"a header is broken: {error}") from error
    if broken is not None:
        raise DamagedCheckpoint(path, f"the checksum of {broken} is wrong")


def network_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's own state dict out of a training checkpoint."""
    state = checkpoint["state_dict"]
    return {
        name.removeprefix(NETWORK_PREFIX): value for name, value in state.items() if name.startswith(NETWORK_PREFIX)
    }
