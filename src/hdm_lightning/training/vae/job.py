"""A whole autoencoder training command: all checks first, then one process per device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdm_lightning.training import hardware, run_folder
from hdm_lightning.training.launching.launch import launch
from hdm_lightning.training.preflight import check_world_size
from hdm_lightning.training.vae.checks import autoencoder_factor, check_vae_settings, plan_vae, vae_settings_from
from hdm_lightning.training.vae.continued import check_vae_continued
from hdm_lightning.training.vae.data import check_images
from hdm_lightning.training.vae.settings import VaeTrainSettings


@dataclass(frozen=True)
class VaeJob:
    """A checked training command.

    Attributes:
        config: the plain resolved configuration, which is what other processes get.
        settings: the same, typed.
        processes: processes on this machine.
    """

    config: dict[str, Any]
    settings: VaeTrainSettings
    processes: int

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.settings.run_dir)

    def is_finished(self) -> bool:
        """Whether the run has been trained to its end and has exported its autoencoder."""
        plan = plan_vae(self.settings, world_size=1)
        return run_folder.is_finished(self.run_dir) and run_folder.stage_is_done(self.run_dir, plan)


def check_vae_job(config: dict[str, Any]) -> VaeJob:
    """Check everything that can be checked before a weight is allocated.

    Raises:
        UserError: naming the key or file and the hint.
    """
    settings = vae_settings_from(config)
    run_folder.check_resume(Path(settings.run_dir), settings.resume)
    processes, world_size = hardware.local_devices(settings.trainer), check_world_size(settings.trainer)
    check_vae_settings(settings, autoencoder_factor(settings))
    plan = plan_vae(settings, world_size)
    check_vae_continued(settings, plan)
    check_images(settings, plan)
    return VaeJob(config, settings, processes)


def run_vae_job(job: VaeJob) -> int:
    """Train; returns the exit status (0, 143 after a signal, 130 after Ctrl-C)."""
    from hdm_lightning.training.vae.run import work  # noqa: PLC0415 (imports Lightning's trainer, seconds)

    if job.is_finished():
        final = job.run_dir / run_folder.FINAL
        print(
            f"{job.run_dir} is finished: there is nothing to train, {run_folder.FINAL}/ is written again. Another run "
            f"needs another name=; autoencoder.source={final} starts it from this result",
            flush=True,
        )
    return launch(work, job.config, job.processes)
