"""Checkpoints that can be gone on from: whole to the last bit, and what happens to those that are not.

A checkpoint is a zip file whose writer sums up each record as it goes (CRC-32). PyTorch's reader never looks at the
sums, so a bit that has flipped on the disk would be trained on; here they are compared.
"""

import zipfile
from pathlib import Path
from typing import Any

from hdm_lightning.errors import UserError
from hdm_lightning.training import run_folder
from hdm_lightning.training.callbacks.checkpoints import PATTERN, SET_ASIDE, checkpoints_in
from hdm_lightning.training.handover import DamagedCheckpoint, read_checkpoint
from hdm_lightning.training.stages import StagePlan

_PARTS = ("hdm", "state_dict", "callbacks")


def read_intact(path: Path) -> dict[str, Any]:
    """A training checkpoint whose every record is as it was written, its tensors left on disk until they are used.

    Raises:
        DamagedCheckpoint: it is not, or it is that of another step than its name says.
    """
    checkpoint = read_parts(path)
    _compare_sums(path)
    return checkpoint


def read_parts(path: Path) -> dict[str, Any]:
    """A training checkpoint with all that every one has, of the step in its name; its records are not compared.

    Raises:
        DamagedCheckpoint: it is none.
    """
    checkpoint = read_checkpoint(path, lazily=True)
    lacking = [key for key in _PARTS if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict))]
    if lacking:
        raise DamagedCheckpoint(path, f"it lacks {', '.join(lacking)}")
    named, step = PATTERN.fullmatch(path.name), checkpoint["hdm"].get("step")
    if named is not None and int(named[1]) != step:
        raise DamagedCheckpoint(path, f"it is that of step {step}")
    return checkpoint


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is intact; newer ones are set aside. None where there has been none.

    Raises:
        UserError: there have been some, and all are damaged.
    """
    for path in reversed(checkpoints_in(folder)):
        if is_intact(path):
            return path
    require_some(folder)
    return None


def intact_end(run_dir: Path, plan: StagePlan) -> Path | None:
    """The checkpoint of a done stage's last step; None where it is damaged, which undoes the stage's end."""
    path = run_folder.stage_end(run_dir, plan)
    return path if path is not None and is_intact(path) else None


def is_intact(path: Path) -> bool:
    """Whether a checkpoint can be gone on from; one that cannot is set aside, which is told."""
    try:
        read_intact(path)
    except DamagedCheckpoint as damage:
        set_aside(path, damage.reason)
        return False
    return True


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged checkpoint, so that it is neither gone on from nor lost, and say so."""
    aside = path.with_name(path.name + SET_ASIDE)
    path.replace(aside)
    print(f"{path} is damaged ({reason}): kept as {aside.name}, going on from the one before it", flush=True)


def require_some(folder: Path) -> None:
    """Refuse a folder whose checkpoints have all been set aside: to begin anew must be the user's decision.

    Raises:
        UserError: naming the folder and the ways out.
    """
    damaged = sorted(folder.glob(f"step-*{SET_ASIDE}"))
    if damaged and not checkpoints_in(folder):
        raise UserError(
            f"no checkpoint is left that is not damaged ({', '.join(path.name for path in damaged)})",
            where=str(folder),
            hint="put a copy of one there under its old name, or delete the folder to begin the stage anew",
        )


def _compare_sums(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # a flipped bit in a header is read as a method, a size or a name that cannot be
        raise DamagedCheckpoint(path, f"a header is broken: {error}") from error
    if broken is not None:
        raise DamagedCheckpoint(path, f"the checksum of {broken} is wrong")
