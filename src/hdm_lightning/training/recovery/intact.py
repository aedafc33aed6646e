"""The end of a stage, which a damaged checkpoint undoes."""

from pathlib import Path

from hdm_lightning.training import run_folder
from hdm_lightning.training.checkpoint_io import is_intact
from hdm_lightning.training.stages import StagePlan


def intact_end(run_dir: Path, plan: StagePlan) -> Path | None:
    """The checkpoint of a done stage's last step; None where it is damaged, which undoes the stage's end."""
    path = run_folder.stage_end(run_dir, plan)
    return path if path is not None and is_intact(path) else None
