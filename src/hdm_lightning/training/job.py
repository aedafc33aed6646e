"""A whole training command: all checks first, then one process per device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdm_lightning.training import hardware, run_folder
from hdm_lightning.training.averaging.averages import check_averages
from hdm_lightning.training.checks import model_config_from, train_settings_from
from hdm_lightning.training.continued import check_continued
from hdm_lightning.training.data_settings import check_data
from hdm_lightning.training.launching.launch import launch
from hdm_lightning.training.optimization.optimizers import check_optimizer
from hdm_lightning.training.preflight import (
    check_autoencoder,
    check_encoder_limits,
    check_guard,
    check_init,
    check_stops,
    check_text_encoder,
    check_world_size,
)
from hdm_lightning.training.settings import TrainSettings
from hdm_lightning.training.stages import plan_stages


@dataclass(frozen=True)
class Job:
    """A checked training command.

    Attributes:
        config: the plain resolved configuration, which is what other processes get.
        settings: the same, typed.
        processes: processes on this machine.
    """

    config: dict[str, Any]
    settings: TrainSettings
    processes: int

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.settings.run_dir)

    def is_finished(self) -> bool:
        """Whether the run has done all stages of its schedule and exported its model."""
        plans = plan_stages(self.settings.schedule, world_size=1)
        return run_folder.is_finished(self.run_dir) and all(run_folder.stage_is_done(self.run_dir, p) for p in plans)


def check_job(config: dict[str, Any]) -> Job:
    """Check everything that can be checked before a weight is allocated.

    Raises:
        UserError: naming the key or file and the hint.
    """
    settings = train_settings_from(config)
    run_folder.check_resume(Path(settings.run_dir), settings.resume)
    check_guard(settings.guard)
    check_optimizer(settings.optimizer)
    check_averages(settings.callbacks.ema)
    hardware.precision(settings.trainer)
    hardware.check_strategy(settings.trainer, settings.optimizer.name)
    processes, world_size = hardware.local_devices(settings.trainer), check_world_size(settings.trainer)
    model = model_config_from(settings.model)
    plans = plan_stages(settings.schedule, world_size)
    for plan in plans:
        check_data(settings, plan)
    check_stops(settings, plans)
    check_init(settings, plans)
    check_continued(settings, model, plans)
    check_encoder_limits(settings)
    check_text_encoder(settings, model)
    check_autoencoder(settings, model, plans)
    return Job(config, settings, processes)


def run_job(job: Job) -> int:
    """Train; returns the exit status (0, 143 after a signal, 130 after Ctrl-C)."""
    from hdm_lightning.training.run import work  # noqa: PLC0415 (imports Lightning's trainer, seconds)

    if job.is_finished():
        print(
            f"{job.run_dir} is finished: there is nothing to train, {run_folder.FINAL}/ is written again. Another run "
            f"needs another name=; init={job.run_dir} starts it from these weights",
            flush=True,
        )
    return launch(work, job.config, job.processes)
