"""What every training process does around its work: quiet libraries, signals, process group, host settings, lock."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from hdm_lightning.training import hardware, processes, run_folder
from hdm_lightning.training.callbacks.signals import StoppedBySignal
from hdm_lightning.training.launching.run_lock import alone_in
from hdm_lightning.training.quiet import quiet_libraries
from hdm_lightning.training.recovery.stop_request import STOP
from hdm_lightning.training.settings import TrainerSettings
from hdm_lightning.whole_files import disk_full_error, is_disk_full, write_json, write_text


def run_process(trainer: TrainerSettings, run_dir: Path, body: Callable[[], None]) -> int:
    """Run `body` as one process of the run in `run_dir`; returns the exit status.

    It is 0, 143 after a signal, or 130 after Ctrl-C.

    Raises:
        UserError: what the body raised; machines with different numbers of processes; another start is at work in the
            folder; the disk is full, wherever it was found out.
    """
    with STOP.listening():
        quiet_libraries()
        multiple = processes.join_group(hardware.accelerator(trainer))
        status = 0
        try:
            processes.require_even_machines()
            hardware.prepare_host(trainer, processes.world_size())
            with alone_in(run_dir):
                body()
        except StoppedBySignal as stop:
            if processes.rank() == 0:
                print(stop)
            status = STOP.status
        except Exception as error:  # each library has one of its own for a full disk
            if is_disk_full(error):
                raise disk_full_error(getattr(error, "filename", None) or "run_dir") from error
            raise
        if multiple:  # not after a failure, where it would wait for processes that are gone
            dist.destroy_process_group()
        return status


def describe_run(run_dir: Path, config_text: str) -> None:
    """Write the run's configuration and environment; the first process works."""
    if processes.rank() == 0:
        write_text(run_dir / run_folder.CONFIG, config_text)
        write_json(run_dir / run_folder.ENVIRONMENT, hardware.environment())
