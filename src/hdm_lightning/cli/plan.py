"""`hdm-plan`: forecast time, memory, disk and cost of a schedule on given GPUs, or fit a schedule to a budget.

`hdm-plan autoencoder` forecasts the memory of autoencoder training instead.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from hdm_lightning.cli.command import collection_paused, show_report
from hdm_lightning.cli.hydra_app import run_hydra

AUTOENCODER = "autoencoder"


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == [AUTOENCODER]:
        del sys.argv[1]
        sys.exit(run_hydra(autoencoder, "plan_autoencoder"))
    with collection_paused():  # composing and importing take most of the time
        status = run_hydra(schedule, "plan")
    sys.exit(status)


def schedule(config: DictConfig) -> None:
    """Forecast a schedule, print it, and write it if asked to."""
    from hdm_lightning.cli.plan_schedule import run_plan  # noqa: PLC0415 (imports torch; keeps --help fast)
    from hdm_lightning.training.recorded import recorded_values  # noqa: PLC0415

    result = run_plan(recorded_values(config), log=print)
    show_report(result.report, result.content, _out(config))


def autoencoder(config: DictConfig) -> None:
    """Do the same for autoencoder training."""
    from hdm_lightning.cli.plan_autoencoder import autoencoder_report, plan_autoencoder  # noqa: PLC0415
    from hdm_lightning.profiling.forecast import plain  # noqa: PLC0415

    result = plan_autoencoder(config, log=print)
    show_report(autoencoder_report(result), plain(result), _out(config))


def _out(config: DictConfig) -> Path | None:
    return Path(str(config.out)) if config.get("out") else None


if __name__ == "__main__":
    main()
