"""`hdm-train`: compose a schedule, check it, start one process per device, train, export."""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.cli.hydra_app import in_sweep, output_dir, run_hydra


def main() -> None:
    """Entry point."""
    sys.exit(run_hydra(train, "train"))


def train(config: DictConfig) -> float | None:
    """Check and run one job; returns the last validation loss, for sweepers."""
    from hdm_lightning.training.job import check_job, run_job  # noqa: PLC0415 (torch and transformers take seconds)

    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    plain["run_dir"] = str(Path(output_dir() if in_sweep() else plain["run_dir"]).absolute())
    job = check_job(plain)
    if in_sweep() and job.is_finished():
        print(f"{job.run_dir} is finished already: skipped")
    else:
        status = run_job(job)
        if status:
            sys.exit(status)
    return _last_loss(job.run_dir)


def _last_loss(run_dir: Path) -> float | None:
    done = sorted(run_dir.glob("*/done.json"))
    if not done:
        return None
    losses = json.loads(done[-1].read_text())["validation"]
    return min(losses.values(), default=None)
