"""Where things stand inside a run's folder, and what is already done there."""

from pathlib import Path
from typing import Any

from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.checkpoints import checkpoints_in
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.whole_files import write_json

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK = "run.lock"
LEDGER = "ledger.jsonl"
QUARANTINE = "quarantine.jsonl"
ENVIRONMENT = "environment.json"
WHITENING = "text_whitening.safetensors"
FINAL = "final"
MODEL_FILES = (f"{FINAL}/model_index.json", f"{FINAL}/model.safetensors")
"""What a finished run has, now and in the layout of before."""
DONE = "done.json"


def checkpoint_folder(run_dir: Path, plan: StagePlan) -> Path:
    """Folder of a stage's checkpoints."""
    return plan.folder(run_dir) / CHECKPOINTS


def newest_checkpoint(run_dir: Path, plan: StagePlan) -> Path | None:
    """The stage's newest whole checkpoint."""
    found = checkpoints_in(checkpoint_folder(run_dir, plan))
    return found[-1] if found else None


def stage_is_done(run_dir: Path, plan: StagePlan) -> bool:
    """Whether the stage has ended and left its last checkpoint."""
    return (plan.folder(run_dir) / DONE).exists() and newest_checkpoint(run_dir, plan) is not None


def mark_stage_done(run_dir: Path, plan: StagePlan, summary: dict[str, Any]) -> None:
    """Record the end of a stage; written last, after its checkpoint."""
    write_json(plan.folder(run_dir) / DONE, summary)


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
