"""One process of a run: signals, process group, host settings, the run's lock."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from hdm_lightning.training import hardware, run_folder, world
from hdm_lightning.training.callbacks.stop_on_signal import StoppedBySignal
from hdm_lightning.training.composition import plain
from hdm_lightning.training.hardware import quiet_libraries
from hdm_lightning.training.recipe import group, recipe_of
from hdm_lightning.training.run_lock import alone_in
from hdm_lightning.training.schedule import Run, run_schedule
from hdm_lightning.training.stop_request import STOP
from hdm_lightning.training.strategies import processes
from hdm_lightning.whole_files import disk_full_error, is_disk_full


def work(order: dict[str, Any]) -> int:
    """One process of a run; returns the exit status: 0, 143 after a signal, or 130 after Ctrl-C.

    Args:
        order: `config`, the composed configuration as YAML with its interpolations.

    Raises:
        UserError: a mistake that only shows now; another start is at work in the folder; the disk is full.
    """
    config = OmegaConf.create(order["config"])
    recipe = recipe_of(config)
    run_dir, kind = Path(config.run_dir), hardware.accelerator(plain(config, "trainer.accelerator"))
    status = 0
    with STOP.listening():
        quiet_libraries()
        several = world.join_group(kind)
        try:
            world.require_even_machines()
            hardware.prepare_host(kind, int(plain(config, "hardware.threads")), processes.world_size())
            with alone_in(run_dir):
                run_folder.check_resume(run_dir, config.resume)  # again: another start may just have ended
                run = Run(
                    config,
                    recipe,
                    recipe.plans(config, processes.world_size()),
                    run_dir,
                    group(config, recipe, "guard").rewinds,
                    bool(OmegaConf.select(config, "schedule.carry_moments")),
                )
                run.network = recipe.build(run)
                run_schedule(run)
        except StoppedBySignal as stop:
            if processes.rank() == 0:
                print(stop)
            status = STOP.status
        except Exception as error:  # each library has one of its own for a full disk
            if is_disk_full(error):
                raise disk_full_error(getattr(error, "filename", None) or "run_dir") from error
            raise
        if several:  # not after a failure, where it would wait for processes that are gone
            dist.destroy_process_group()
    return status
