"""Where things stand inside a run's folder, and what is already done there."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hdm_lightning.errors import UserError
from hdm_lightning.training.checkpoint_io import checkpoint_path, checkpoints_in, is_intact
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.whole_files import write_json

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK = "run.lock"
LEDGER = "ledger.jsonl"
ENVIRONMENT = "environment.json"
COMPILED = "compiled"
WHITENING = "text_whitening.safetensors"
FINAL = "final"
DONE = "done.json"
DESCRIPTIONS = ("model_index.json", "config.json")
"""What describes a model; the latter also an autoencoder, and models in the layout of before."""


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
    try:
        steps = int(json.loads((plan.folder(run_dir) / DONE).read_text())["steps"])
    except (OSError, ValueError, LookupError, TypeError):  # killed before it was written, or damaged
        return None
    path = checkpoint_path(checkpoint_folder(run_dir, plan), steps)
    return path if path.exists() else None


def next_stage(run_dir: Path, plans: list[StagePlan]) -> StagePlan | None:
    """The stage to train now; None where all are done.

    It is the first that is not done. Where it would begin from the end of the one before, or where all are done, that
    end is read whole, and a damaged one is set aside: its stage is then not done any more.

    Raises:
        UserError: all checkpoints of a stage are damaged.
    """
    while True:
        pending = next((plan for plan in plans if not stage_is_done(run_dir, plan)), None)
        if pending is not None and newest_checkpoint(run_dir, pending) is not None:
            return pending
        before = plans[-1] if pending is None else next((p for p in plans if p.number == pending.number - 1), None)
        end = None if before is None else stage_end(run_dir, before)
        if end is None or is_intact(end):
            return pending


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
    done: dict[str, Any] = json.loads((plan.folder(run_dir) / DONE).read_text())
    return done


def read_environment(run_dir: Path) -> dict[str, Any]:
    """Versions, commit and devices of the run's last start."""
    environment: dict[str, Any] = json.loads((run_dir / ENVIRONMENT).read_text())
    return environment


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
