"""Where a stage resumes: from which checkpoint, and past which samples after a loss that went wrong.

`rewinds.jsonl` in a stage's folder has a line for each rewind. A checkpoint records how many lines there were when its
fit began; a later line that goes back to before the checkpoint supersedes it.
"""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.loss_guard import LossRewind, guard_streak
from hdm_lightning.training.checkpoint_io import (
    DamagedCheckpoint,
    checkpoints_in,
    read_intact,
    read_parts,
    require_some,
    set_aside,
)
from hdm_lightning.training.modules.resumable_module import KEY
from hdm_lightning.training.run_folder import REWINDS
from hdm_lightning.whole_files import append_line, read_lines


@dataclass(frozen=True)
class Rewind:
    """One line of the record.

    Attributes:
        reason: what happened.
        step: the optimizer step at which it was noticed.
        checkpoint_step: the step that the stage resumes from; 0 is its beginning.
        first: position of the first sample that is skipped.
        end: position after the last one.
        skipped: samples skipped before the next step by this and all earlier rewinds.
        suspects: keys of the samples whose loss was not finite, or highest.
        keys: keys of the samples skipped, in the order of their positions.
        keys_forgotten: number of further samples skipped, whose keys were not kept.
    """

    reason: str
    step: int
    checkpoint_step: int
    first: int
    end: int
    skipped: int
    suspects: list[str]
    keys: list[str]
    keys_forgotten: int = 0


@dataclass(frozen=True)
class StartPoint:
    """Where a fit of a stage begins.

    Attributes:
        checkpoint: the file, or None for the stage's beginning.
        step: optimizer steps done.
        skipped: samples that rewinds have skipped before the next step.
        rewinds: number of lines in the record.
    """

    checkpoint: Path | None
    step: int
    skipped: int
    rewinds: int

    def consumed(self, batch_size: int) -> int:
        """Return the position of the first sample of the next step."""
        return self.step * batch_size + self.skipped


class NoteRewinds(Callback):
    """Record in every checkpoint how many rewinds there were before the fit, and how many samples they skipped."""

    def __init__(self, start: StartPoint) -> None:
        self.start = start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store both beside the module's position."""
        checkpoint.setdefault(KEY, {}).update(skipped=self.start.skipped, rewinds=self.start.rewinds)


def skip_window(hit: LossRewind, begun: StartPoint, back: StartPoint, batch_size: int) -> Rewind:
    """Return the rewind that skips the samples from the start to go back to through the step that went wrong.

    `begun` is the newest start of the stage, with the samples skipped before that step.
    """
    first, end = back.consumed(batch_size), hit.finding.step * batch_size + begun.skipped
    keys = [key for position, key in hit.samples if first <= position < end]
    return Rewind(
        reason=hit.finding.reason,
        step=hit.finding.step,
        checkpoint_step=back.step,
        first=first,
        end=end,
        skipped=end - back.step * batch_size,
        suspects=hit.suspects,
        keys=keys,
        keys_forgotten=end - first - len(keys),
    )


def read_position(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's position in its stage: `step`, `batch_size` and the like.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    position: dict[str, Any] = read_parts(checkpoint)[KEY]
    return position


def newest_position(checkpoints: Path) -> dict[str, Any] | None:
    """Return the position of a stage's newest readable checkpoint, or None if there is none."""
    for path in reversed(checkpoints_in(checkpoints)):
        with suppress(DamagedCheckpoint):
            return read_position(path)
    return None


def write_rewind(folder: Path, rewind: Rewind) -> None:
    """Append a line to the record of the stage in `folder`, and sync it."""
    append_line(folder / REWINDS, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asdict(rewind)})


def read_rewinds(folder: Path) -> list[Rewind]:
    """Return the record of the stage in `folder`, oldest first.

    Raises:
        UserError: a line is not a rewind, so the samples it skips would be trained on.
    """
    found = []
    for line in read_lines(folder / REWINDS):
        known = {key: value for key, value in line.items() if key in Rewind.__dataclass_fields__}
        numbers = [known.get(key) for key in ("step", "checkpoint_step", "first", "end", "skipped")]
        if not all(type(number) is int for number in numbers) or {"reason", "suspects", "keys"} - set(known):
            what = f"line {line} was not written by a run"
            raise UserError(what[:300], where=str(folder / REWINDS), hint="restore the file, or delete that line")
        found.append(Rewind(**known))
    return found


def start_point(checkpoints: Path, rewinds: list[Rewind], *, calm: bool = False) -> StartPoint:
    """Return the newest intact checkpoint that no later rewind supersedes, and the samples skipped after it.

    Damaged checkpoints that are found on the way are set aside; see `training.checkpoint_io`.

    Args:
        checkpoints: the stage's folder of checkpoints.
        rewinds: the stage's record.
        calm: use checkpoints written while the guard already saw a high loss only if there is no other.

    Raises:
        UserError: all checkpoints are damaged.
    """
    restless: StartPoint | None = None
    for path in reversed(checkpoints_in(checkpoints)):
        try:
            if _superseded(read_position(path), rewinds):
                continue
            saved = read_intact(path)
        except DamagedCheckpoint as damage:
            set_aside(path, damage.reason)
            continue
        found = _after(path, saved[KEY], rewinds)
        if not calm or guard_streak(saved) == 0:
            return found
        restless = restless or found
    require_some(checkpoints)
    return restless or _after(None, {"step": 0}, rewinds)


def remove_superseded(checkpoints: Path, start: StartPoint) -> None:
    """Delete the checkpoints after the start, which would otherwise pass for those of later steps."""
    for path in checkpoints_in(checkpoints):
        if start.checkpoint is None or path.name > start.checkpoint.name:
            path.unlink(missing_ok=True)


def _superseded(position: dict[str, Any], rewinds: list[Rewind]) -> bool:
    return any(rewind.checkpoint_step < position["step"] for rewind in rewinds[position.get("rewinds", 0) :])


def _after(path: Path | None, position: dict[str, Any], rewinds: list[Rewind]) -> StartPoint:
    here = [rewind.skipped for rewind in rewinds if rewind.checkpoint_step == position["step"]]
    return StartPoint(path, position["step"], max([position.get("skipped", 0), *here]), len(rewinds))
