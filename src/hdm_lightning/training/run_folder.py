"""Where things stand inside a run's folder, and what is already done there."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hdm_lightning.errors import UserError
from hdm_lightning.json_files import object_or_empty, read_object
from hdm_lightning.printable import in_one_line
from hdm_lightning.training.checkpoint_io import checkpoint_path, checkpoints_in, is_intact
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.whole_files import disk_full_error, is_disk_full, write_json

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK = "run.lock"
LEDGER = "ledger.jsonl"
REWINDS = "rewinds.jsonl"
ENVIRONMENT = "environment.json"
COMPILED = "compiled"
WHITENING = "text_whitening.safetensors"
FINAL = "final"
DONE = "done.json"
OF_LOGGERS = ("hparams", "ema_snapshots", "wandb", "mlruns", "trackio")
"""Other folders that callbacks and loggers of this package make beside the stages."""
_NUMBERED = re.compile(
    r"\d{12}-?.*\.(png|safetensors)|events\.out\.tfevents\..*|(offline-)?run-.*|metrics\.csv|version_\d+|\.trash|\d{18}"
)
"""What they write there, and into the folders of a stage."""
DESCRIPTIONS = ("model_index.json", "config.json", "adapter_config.json")
"""What describes a model, an autoencoder (and models in the layout of before), an adapter."""


def checkpoint_folder(run_dir: Path, plan: StagePlan) -> Path:
    """Folder of a stage's checkpoints."""
    return plan.folder(run_dir) / CHECKPOINTS


def newest_checkpoint(run_dir: Path, plan: StagePlan) -> Path | None:
    """The stage's newest checkpoint by its name."""
    found = checkpoints_in(checkpoint_folder(run_dir, plan))
    return found[-1] if found else None


def stage_is_done(run_dir: Path, plan: StagePlan) -> bool:
    """Whether the stage has ended and its last checkpoint is there."""
    return stage_end(run_dir, plan) is not None


def stage_end(run_dir: Path, plan: StagePlan) -> Path | None:
    """The checkpoint of the last step of a stage that has ended; None where it has not, or where that one is gone."""
    steps = _steps_done(run_dir, plan)
    path = None if steps is None else checkpoint_path(checkpoint_folder(run_dir, plan), steps)
    return path if path is not None and path.exists() else None


def _steps_done(run_dir: Path, plan: StagePlan) -> int | None:
    """The steps of a stage that has ended; None where it has not, or what says so is damaged."""
    steps = object_or_empty(plan.folder(run_dir) / DONE).get("steps")
    return steps if isinstance(steps, int) else None


def _is_cleared(run_dir: Path, plan: StagePlan) -> bool:
    """Whether a stage has ended and somebody has deleted all its checkpoints."""
    ended = _steps_done(run_dir, plan) is not None
    return ended and not any(checkpoint_folder(run_dir, plan).glob("step-*.ckpt*"))


def next_stage(run_dir: Path, plans: list[StagePlan]) -> StagePlan | None:
    """The stage to train now; None where all are done.

    It is the first that is not done. Where it would begin from the end of the one before, or where all are done, that
    end is read whole, and a damaged one is set aside: its stage is then not done any more. A stage whose checkpoints
    were deleted after its end is passed over where they are not needed any more.

    Raises:
        UserError: all checkpoints of a stage are damaged, or those that the next stage would begin from are deleted.
    """
    while True:
        pending = next((p for p in plans if not stage_is_done(run_dir, p) and not _is_cleared(run_dir, p)), None)
        if pending is not None and newest_checkpoint(run_dir, pending) is not None:
            return pending
        before = plans[-1] if pending is None else next((p for p in plans if p.number == pending.number - 1), None)
        if before is not None and _is_cleared(run_dir, before) and not (pending is None and is_finished(run_dir)):
            raise _cleared_error(run_dir, before)
        end = None if before is None else stage_end(run_dir, before)
        if end is None or is_intact(end):
            return pending


def _cleared_error(run_dir: Path, plan: StagePlan) -> UserError:
    return UserError(
        f"stage {plan.name} has ended, and its last checkpoint, which comes next, is gone",
        where=str(checkpoint_folder(run_dir, plan)),
        hint=f"put it back, or delete {plan.folder(run_dir) / DONE} to train the stage anew",
    )


def require_writable(run_dir: Path, plans: list[StagePlan]) -> None:
    """Find out before anything is trained whether the run's files can be written.

    Raises:
        UserError: naming the folder that no file can be made in or that is another's link to another place, or the
            file that cannot be continued.
    """
    folders = [run_dir, *(plan.folder(run_dir) for plan in plans), *(checkpoint_folder(run_dir, p) for p in plans)]
    _refuse_links(run_dir, plans)
    for folder in dict.fromkeys(_nearest(folder) for folder in folders):
        try:
            with tempfile.TemporaryFile(dir=folder) as trial:
                trial.write(b"x")
        except OSError as error:
            raise _unwritable(folder, error) from error
    for file in (run_dir / CONFIG, run_dir / ENVIRONMENT, *(plan.folder(run_dir) / DONE for plan in plans)):
        if file.exists() and not file.is_file():
            what = "is no file, and the run writes one there"
            raise UserError(what, where=str(file), hint="move it away, or choose another run_dir=")
    # Not the lock's file: who closes it frees the lock.
    for file in (run_dir / LEDGER, *(plan.folder(run_dir) / REWINDS for plan in plans)):
        try:
            if file.exists() and not file.is_symlink():
                os.close(os.open(file, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise _unwritable(file, error) from error


def _refuse_links(run_dir: Path, plans: list[StagePlan]) -> None:
    """Raise UserError where a folder of a run that somebody may have sent leads elsewhere: a run writes in its own."""
    stages = [plan.folder(run_dir) for plan in plans]
    moved = [*stages, run_dir / FINAL, *(run_dir / name for name in OF_LOGGERS)]
    moved += [inside for stage in stages if stage.is_dir() for inside in stage.iterdir()]
    exported = [Path(place, name) for place, names, _ in os.walk(run_dir / FINAL) for name in names]
    for folder in [*moved, *exported]:
        if not folder.is_symlink() or (folder.exists() and not folder.is_dir()):  # files are replaced, links or not
            continue
        inside = folder.resolve().is_relative_to(run_dir.resolve())
        if not inside and (folder in exported or not _is_own_link(folder)):
            what = (
                f"is a link to {in_one_line(os.path.realpath(folder))}: another user's, or to a folder of other things"
            )
            hint = f"move what the link leads to here; for another disk choose run_dir= there, or make {run_dir} a link"
            raise UserError(what, where=str(folder), hint=hint)


def _is_own_link(link: Path) -> bool:
    """Whether who trains has made a link, to a larger disk: to a folder that is empty or has what a run puts there.

    Its owner alone does not tell: links that come in an archive belong to whoever unpacks it.
    """
    if link.lstat().st_uid != os.geteuid():
        return False
    try:
        inside = os.listdir(link)
    except OSError:  # such as of a disk that is not there: whether it can be written to is asked next
        return True
    written = {CHECKPOINTS, DONE, *DESCRIPTIONS} & set(inside) or checkpoints_in(link)
    return not inside or bool(written) or any(_NUMBERED.fullmatch(name) for name in inside)


def _nearest(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))


def _unwritable(path: Path, error: OSError) -> UserError:
    if is_disk_full(error):
        return disk_full_error(path)
    what = f"cannot be written to ({error.strerror})"
    return UserError(what, where=str(path), hint="change its permissions or move it away, or choose another run_dir=")


def is_finished(run_dir: Path) -> bool:
    """Whether the run has exported its model or its autoencoder to the end.

    A model's description is written after its card, an autoencoder's card after its config.json: both are there only
    when all is.
    """
    written = {name for name in (*DESCRIPTIONS, "README.md") if (run_dir / FINAL / name).exists()}
    return "README.md" in written and len(written) > 1


def way_on(config: DictConfig, run_dir: Path) -> str:
    """What starts another run from the result of a finished one."""
    return f"init={run_dir}" if "schedule" in config else f"autoencoder.source={run_dir / FINAL}"


def mark_stage_done(run_dir: Path, plan: StagePlan, summary: dict[str, Any]) -> None:
    """Record the end of a stage; written last, after its checkpoint."""
    write_json(plan.folder(run_dir) / DONE, summary)


def read_done(run_dir: Path, plan: StagePlan) -> dict[str, Any]:
    """What was recorded of a stage's end."""
    return read_object(plan.folder(run_dir) / DONE, hint="delete it: the same command ends the stage again")


def read_environment(run_dir: Path) -> dict[str, Any]:
    """Versions, commit and devices of the run's last start; empty where they cannot be read, which ends no run."""
    return object_or_empty(run_dir / ENVIRONMENT)


def check_resume(run_dir: Path, resume: str) -> None:
    """Refuse a folder that holds a run when the user asked for a fresh one.

    Raises:
        UserError: for an unknown value of `resume`, or `never` with something there.
    """
    if resume not in ("auto", "never"):
        raise UserError(f"'{resume}' is neither 'auto' nor 'never'", where="resume", hint="resume=auto")
    if resume == "never" and any(run_dir.glob("*/checkpoints/step-*.ckpt")):
        raise UserError(
            f"{run_dir} already holds checkpoints",
            where="run_dir",
            hint="choose another name=..., or resume=auto to continue, or delete the folder",
        )
