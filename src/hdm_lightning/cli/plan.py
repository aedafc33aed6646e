"""`hdm-plan`: time, memory, disk and cost of a schedule on given GPUs, or a schedule for a budget.

`hdm-plan autoencoder` forecasts the memory of an autoencoder's training instead.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console, RenderableType

from hdm_lightning.cli.hydra_app import run_hydra
from hdm_lightning.whole_files import write_json

AUTOENCODER = "autoencoder"
# Wide enough for a schedule of four stages where the output is no terminal.
_WIDTH = 120


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == [AUTOENCODER]:
        del sys.argv[1]
        sys.exit(run_hydra(autoencoder, "plan_autoencoder"))
    sys.exit(run_hydra(schedule, "plan"))


def schedule(config: DictConfig) -> None:
    """Forecast a schedule, print, and write what was asked for."""
    from hdm_lightning.cli.plan_schedule import run_plan  # noqa: PLC0415 (imports torch: --help stays quick)
    from hdm_lightning.training.recorded import recorded_values  # noqa: PLC0415

    console = _console()
    result = run_plan(recorded_values(config), log=lambda text: console.print(text, style="dim"))
    _finish(console, result.report, result.content, result.out)


def autoencoder(config: DictConfig) -> None:
    """The same of an autoencoder's training."""
    from hdm_lightning.cli.plan_autoencoder import autoencoder_report, plan_autoencoder  # noqa: PLC0415

    console = _console()
    result = plan_autoencoder(config, log=lambda text: console.print(text, style="dim"))
    _finish(console, autoencoder_report(result), result.to_json(), result.out)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def _finish(console: Console, report: RenderableType, content: dict[str, Any], out: str | None) -> None:
    console.print(report)
    if out is not None:
        write_json(Path(out), content)
        console.print(f"written to {out}")
