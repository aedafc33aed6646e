"""What a finished run was set to and what came of it, for TensorBoard's HParams page: one row a run."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.training import processes, run_folder

if TYPE_CHECKING:
    from hdm_lightning.training.run import Run

FOLDER = "hparams"
OUTCOME_PREFIX = "outcome/"
LEFT_OUT = (
    r"run_dir|name|resume|(logger|guard|trainer)\..*",
    r"callbacks\.(checkpoints|pictures|extra)\..*|callbacks\.progress_bar|callbacks\.ema\.snapshot_.*",
    r"data\.(workers|lanes|window|max_bad_share|bad_patience|cache_dir|cache_gb|memory_cache_gb)",
    r"(text_encoder|vae)\.(max_tokens|max_pixels|cache_size|made_by)",
    r"schedule\.stages\.\w+\.(micro_batch_size|activation_checkpointing|validate_every|save_every|sample_every)",
)
"""Settings that say where a run lies, what it shows and how fast it is, not what it learns: patterns of whole keys."""


def write_hparams(run: "Run") -> None:
    """Write the run's row into its folder, over an earlier one; the first process works."""
    if processes.rank() == 0:
        done = [json.loads((plan.folder(run.run_dir) / run_folder.DONE).read_text()) for plan in run.plans]
        events = run.ledger.events()
        outcome = {
            **{f"validation_loss_{name}": value for name, value in done[-1]["validation"].items()},
            "samples": float(sum(stage["samples"] for stage in done)),
            "device_hours": sum(event.get("device_hours", 0.0) for event in events),
            "cost_usd": sum(event.get("cost_usd", 0.0) for event in events),
        }
        write_row(run.run_dir / FOLDER, flat_settings(asdict(run.settings)), outcome, int(outcome["samples"]))


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, float | str | bool]:
    """Every leaf under its dotted key; lists become text, None becomes `null`, `LEFT_OUT` is left out."""
    flat: dict[str, float | str | bool] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{name}.")
        elif not any(re.fullmatch(pattern, name) for pattern in LEFT_OUT):
            flat[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def write_row(folder: Path, settings: dict[str, float | str | bool], outcome: dict[str, float], step: int) -> None:
    """Write settings and outcome as one session of the HParams plugin into `folder`, alone there.

    The outcome's tags get `OUTCOME_PREFIX`; `step` is the samples seen.
    """
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (seconds to import)
    from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415  (as above)

    for old in folder.glob("events.*"):
        old.unlink()
    metrics = {f"{OUTCOME_PREFIX}{name}": value for name, value in outcome.items()}
    with SummaryWriter(str(folder)) as writer:
        for summary in hparams(dict(settings), dict(metrics)):
            writer.file_writer.add_summary(summary)
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, step)
