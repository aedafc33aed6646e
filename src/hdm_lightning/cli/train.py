"""`hdm-train` and `hdm-train-vae`: compose and check a run, start one process per device, train, export."""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.cli.hydra_app import end_job, in_sweep, output_dir, run_hydra


def main() -> None:
    """Entry point of `hdm-train`."""
    sys.exit(run_hydra(train, "train"))


def main_vae() -> None:
    """Entry point of `hdm-train-vae`."""
    sys.exit(run_hydra(train, "train_vae"))


def train(config: DictConfig) -> float | None:
    """Check and run one job.

    Returns:
        The final validation loss of the averaged weights, for sweepers; for an autoencoder, its L1 error.
    """
    print("checking settings, models and data …", flush=True)  # torch and transformers take seconds
    from hdm_lightning.training.job import check_job  # noqa: PLC0415 (torch and transformers take seconds)
    from hdm_lightning.training.launch import launch  # noqa: PLC0415 (as above)
    from hdm_lightning.training.run_folder import is_finished  # noqa: PLC0415 (as above)
    from hdm_lightning.training.schedule import run_schedule  # noqa: PLC0415 (as above)
    from hdm_lightning.training.sweep_results import objective  # noqa: PLC0415 (as above)

    run_dir = Path(output_dir() if in_sweep() else str(config.run_dir)).absolute()
    if in_sweep() and is_finished(run_dir):
        print(f"{run_dir} is already finished: skipped")
    else:
        OmegaConf.update(config, "run_dir", str(run_dir))
        job = check_job(config)
        end_job(launch(run_schedule, job.order(), job.processes))
    return objective(run_dir)


if __name__ == "__main__":  # torchrun starts modules
    main()
