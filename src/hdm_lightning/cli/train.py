"""`hdm-train`: compose a schedule, check it, start one process per device, train, export."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.cli.hydra_app import end_job, in_sweep, output_dir, run_hydra


def main() -> None:
    """Entry point."""
    sys.exit(run_hydra(train, "train"))


def train(config: DictConfig) -> float | None:
    """Check and run one job; returns the final validation loss of the averaged weights, for sweepers."""
    from hdm_lightning.training.job import check_job, run_job  # noqa: PLC0415 (torch and transformers take seconds)
    from hdm_lightning.training.run_folder import is_finished  # noqa: PLC0415 (as above)
    from hdm_lightning.training.sweeps.results import objective  # noqa: PLC0415 (as above)

    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    run_dir = Path(output_dir() if in_sweep() else plain["run_dir"]).absolute()
    if in_sweep() and is_finished(run_dir):
        print(f"{run_dir} is finished already: skipped")
    else:
        end_job(run_job(check_job({**plain, "run_dir": str(run_dir)})))
    return objective(run_dir)


if __name__ == "__main__":  # torchrun starts modules
    main()
