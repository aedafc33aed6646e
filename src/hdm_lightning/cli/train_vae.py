"""`hdm-train-vae`: compose an autoencoder's training, check it, start one process per device, train, export."""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.cli.hydra_app import in_sweep, output_dir, run_hydra


def main() -> None:
    """Entry point."""
    sys.exit(run_hydra(train_vae, "train_vae"))


def train_vae(config: DictConfig) -> float | None:
    """Check and run one job; returns the validation's L1 error, for sweepers."""
    from hdm_lightning.training.vae_job import check_vae_job, run_vae_job  # noqa: PLC0415 (torch takes seconds)

    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    plain["run_dir"] = str(Path(output_dir() if in_sweep() else plain["run_dir"]).absolute())
    job = check_vae_job(plain)
    if in_sweep() and job.is_finished():
        print(f"{job.run_dir} is finished already: skipped")
    else:
        status = run_vae_job(job)
        if status:
            sys.exit(status)
    measures = json.loads((job.run_dir / "final" / "measures.json").read_text())["measures"]
    return float(measures["reconstruction/l1"])
