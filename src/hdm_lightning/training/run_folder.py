"""The layout of a run's folder, and what is already done there."""

import os
import re
import shlex
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
"""Other folders that callbacks and loggers of this package create beside the stages."""
_NUMBERED = re.compile(
    r"\d{12}-?.*\.(png|safetensors)|events\.out\.tfevents\..*|(offline-)?run-.*|metrics\.csv|version_\d+|\.trash|\d{18}"
)
"""Names of the files they write there and in the stages' folders."""
DESCRIPTIONS = ("model_index.json", "config.json", "adapter_config.json")
"""The files that describe a model, an autoencoder (and a model in the former layout), and an adapter."""


def checkpoint_folder(run_dir: Path, plan: StagePlan) -> Path:
    """Return the folder of a stage's checkpoints."""
    return plan.folder(run_dir) / CHECKPOINTS


def stage_is_done(run_dir: Path, plan: StagePlan) -> bool:
    """Return whether the stage has ended and its last checkpoint is there."""
    return stage_end(run_dir, plan) is not None


def stage_end(run_dir: Path, plan: StagePlan) -> Path | None:
    """Return the last checkpoint of a stage that has ended; None if it has not ended or the checkpoint is gone."""
    steps = _steps_done(run_dir, plan)
    path = None if steps is None else checkpoint_path(checkpoint_folder(run_dir, plan), steps)
    return path if path is not None and path.exists() else None


def _steps_done(run_dir: Path, plan: StagePlan) -> int | None:
    """Return the steps of a stage that has ended; None if it has not ended or its record is damaged."""
    steps = object_or_empty(plan.folder(run_dir) / DONE).get("steps")
    return steps if isinstance(steps, int) else None


def _is_cleared(run_dir: Path, plan: StagePlan) -> bool:
    """Return whether a stage has ended and all its checkpoints have been deleted."""
    ended = _steps_done(run_dir, plan) is not None
    return ended and not any(checkpoint_folder(run_dir, plan).glob("step-*.ckpt*"))


def next_stage(run_dir: Path, plans: list[StagePlan]) -> StagePlan | None:
    """Return the stage to train now, or None if all are done.

    It is the first that is not done. If it would start from the end of the stage before, or if all are done, that last
    checkpoint is read in full; if it is damaged, it is set aside and its stage is no longer done. A stage whose
    checkpoints were deleted after its end is skipped if they are no longer needed.

    Raises:
        UserError: all checkpoints of a stage are damaged, or those that the next stage would start from are deleted.
    """
    while True:
        pending = next((p for p in plans if not stage_is_done(run_dir, p) and not _is_cleared(run_dir, p)), None)
        if pending is not None and checkpoints_in(checkpoint_folder(run_dir, pending)):
            return pending
        before = plans[-1] if pending is None else next((p for p in plans if p.number == pending.number - 1), None)
        if before is not None and _is_cleared(run_dir, before) and not (pending is None and is_finished(run_dir)):
            raise _cleared_error(run_dir, before)
        end = None if before is None else stage_end(run_dir, before)
        if end is None or is_intact(end):
            return pending


def _cleared_error(run_dir: Path, plan: StagePlan) -> UserError:
    return UserError(
        f"stage {plan.name} has ended, but its last checkpoint, which is needed now, is gone",
        where=str(checkpoint_folder(run_dir, plan)),
        hint=f"put it back, or delete {plan.folder(run_dir) / DONE} to train the stage again",
    )


def require_writable(run_dir: Path, plans: list[StagePlan]) -> None:
    """Check before training that the run's files can be written.

    Raises:
        UserError: naming a folder that cannot be written to or that links to somebody else's place, or a file that
            cannot be continued.
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
            what = "is not a file, and the run writes one there"
            raise UserError(what, where=str(file), hint="move it away, or choose another run_dir=")
    # Not the lock's file: closing it would free the lock.
    for file in (run_dir / LEDGER, *(plan.folder(run_dir) / REWINDS for plan in plans)):
        try:
            if file.exists() and not file.is_symlink():
                os.close(os.open(file, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise _unwritable(file, error) from error


def _refuse_links(run_dir: Path, plans: list[StagePlan]) -> None:
    """Raise UserError if a folder of the run, which somebody may have sent, is a link that leads elsewhere."""
    stages = [plan.folder(run_dir) for plan in plans]
    moved = [*stages, run_dir / FINAL, *(run_dir / name for name in OF_LOGGERS)]
    moved += [inside for stage in stages if stage.is_dir() for inside in stage.iterdir()]
    exported = [Path(place, name) for place, names, _ in os.walk(run_dir / FINAL) for name in names]
    for folder in [*moved, *exported]:
        if not folder.is_symlink() or (folder.exists() and not folder.is_dir()):  # files are replaced, even links
            continue
        inside = folder.resolve().is_relative_to(run_dir.resolve())
        if not inside and (folder in exported or not _is_own_link(folder)):
            what = (
                f"is a link to {in_one_line(os.path.realpath(folder))}, made by another user or leading to other things"
            )
            hint = f"move the link's target here; to use another disk, choose run_dir= there, or make {run_dir} a link"
            raise UserError(what, where=str(folder), hint=hint)


def _is_own_link(link: Path) -> bool:
    """Return whether the user made a link, e.g. to a larger disk: to a folder that is empty or has a run's files.

    Its owner alone is not enough: links in an archive belong to whoever unpacks it.
    """
    if link.lstat().st_uid != os.geteuid():
        return False
    try:
        inside = os.listdir(link)
    except OSError:  # e.g. a disk that is not mounted; whether it is writable is checked next
        return True
    written = {CHECKPOINTS, DONE, *DESCRIPTIONS} & set(inside) or checkpoints_in(link)
    return not inside or bool(written) or any(_NUMBERED.fullmatch(name) for name in inside)


def _nearest(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))


def _unwritable(path: Path, error: OSError) -> UserError:
    if is_disk_full(error):
        return disk_full_error(path)
    what = f"cannot be written to ({error.strerror})"
    return UserError(what, where=str(path), hint="change its permissions or move it away, or choose another run_dir=")


def is_finished(run_dir: Path) -> bool:
    """Return whether the run has completely exported its model or autoencoder.

    A model's description is written after its card, an autoencoder's card after its config.json: only a complete export
    has both.
    """
    written = {name for name in (*DESCRIPTIONS, "README.md") if (run_dir / FINAL / name).exists()}
    return "README.md" in written and len(written) > 1


def way_on(config: DictConfig, run_dir: Path) -> str:
    """Return the setting that starts another run from the result of a finished one."""
    key, folder = ("init", run_dir) if "schedule" in config else ("autoencoder.source", run_dir / FINAL)
    return f"{key}={shlex.quote(str(folder))}"


def mark_stage_done(run_dir: Path, plan: StagePlan, summary: dict[str, Any]) -> None:
    """Record the end of a stage; written last, after its checkpoint."""
    write_json(plan.folder(run_dir) / DONE, summary)


def read_done(run_dir: Path, plan: StagePlan) -> dict[str, Any]:
    """Return the record of a stage's end."""
    return read_object(plan.folder(run_dir) / DONE, hint="delete it, and the same command repeats the end of the stage")


def read_environment(run_dir: Path) -> dict[str, Any]:
    """Return versions, commit and devices of the run's last start; empty if they cannot be read."""
    return object_or_empty(run_dir / ENVIRONMENT)


def check_resume(run_dir: Path, resume: str) -> None:
    """Refuse a folder that already contains a run if the user asked for a new one.

    Raises:
        UserError: an unknown value of `resume`, or `never` with checkpoints in the folder.
    """
    if resume not in ("auto", "never"):
        raise UserError(f"'{resume}' is neither 'auto' nor 'never'", where="resume", hint="resume=auto")
    if resume == "never" and any(run_dir.glob("*/checkpoints/step-*.ckpt")):
        raise UserError(
            f"{run_dir} already contains checkpoints",
            where="run_dir",
            hint="choose another name=..., or resume=auto to continue, or delete the folder",
        )
