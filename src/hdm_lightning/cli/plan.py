"""`hdm-plan`: time, memory, disk and cost of a schedule on given GPUs, or a schedule for a budget.

`hdm-plan autoencoder` forecasts the memory of an autoencoder's training instead.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.cli.hydra_app import run_hydra

AUTOENCODER = "autoencoder"
# Wide enough for a schedule of four stages where the output is no terminal.
_WIDTH = 120


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == [AUTOENCODER]:
        del sys.argv[1]
        sys.exit(run_hydra(plan_of_autoencoder, "plan_autoencoder"))
    sys.exit(run_hydra(plan, "plan"))


def plan(config: DictConfig) -> None:
    """Forecast, print, and write what was asked for."""
    from rich.console import Console  # noqa: PLC0415 (keeps --help quick, as do the imports of torch below)

    from hdm_lightning.cli.plan_job import run_plan  # noqa: PLC0415
    from hdm_lightning.whole_files import write_json  # noqa: PLC0415

    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    result = run_plan(plain, tell=lambda text: console.print(text, style="dim"))
    console.print(result.report)
    if result.out is not None:
        write_json(Path(result.out), result.content)
        console.print(f"written to {result.out}")


def plan_of_autoencoder(config: DictConfig) -> None:
    """The same of an autoencoder's training."""
    from rich.console import Console  # noqa: PLC0415 (keeps --help quick, as do the imports of torch below)

    from hdm_lightning.cli.plan_autoencoder import autoencoder_report, plan_autoencoder  # noqa: PLC0415
    from hdm_lightning.whole_files import write_json  # noqa: PLC0415

    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    result = plan_autoencoder(plain, tell=lambda text: console.print(text, style="dim"))
    console.print(autoencoder_report(result))
    if result.out is not None:
        write_json(Path(result.out), result.to_json())
        console.print(f"written to {result.out}")
