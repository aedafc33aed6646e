"""Hydra commands: composition errors and user errors on one screen with exit status 2."""

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdm_lightning.cli.command import INTERRUPTED_STATUS, TRACEBACK_VARIABLE, USER_ERROR_STATUS, run_command
from hdm_lightning.cli.moved_keys import present_keys
from hdm_lightning.cli.sweep import JobFailed, finish_sweep, run_swept_job
from hdm_lightning.errors import UserError
from hdm_lightning.printable import printable

LONGEST_FOLDER_NAME = 120
STOPPED = 143
"""Exit status of a job that saved and ended because of a signal."""


def run_hydra(task: Callable[[DictConfig], Any], config_name: str) -> int:
    """Compose `config_name` with the command line, call `task(config)`, and return the exit status.

    A task returns None or a number (for sweepers), raises `UserError`, or exits.
    """
    return run_command(lambda: _run(task, config_name))


def _run(task: Callable[[DictConfig], Any], config_name: str) -> int:
    mistakes: list[UserError] = []

    @functools.wraps(task)
    def guarded(config: DictConfig) -> Any:
        if in_sweep():
            return run_swept_job(task, config, Path(output_dir()))
        try:
            return task(config)
        except UserError as error:
            if os.environ.get(TRACEBACK_VARIABLE) == "1":
                raise
            mistakes.append(error)  # Hydra would print the overrides above the message
            return None

    sys.argv[1:] = present_keys(sys.argv[1:], config_name)
    OmegaConf.register_new_resolver("hdm.short", short_name, replace=True)
    decorate = hydra.main(config_path="pkg://hdm_lightning.conf", config_name=config_name, version_base="1.3")
    application = decorate(guarded)
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let the errors through to here
    try:
        with _telling_of_slurm():
            application()
        if mistakes:
            raise mistakes[0]
        return finish_sweep()
    except JobFailed:
        return finish_sweep()
    except BrokenPipeError:  # `--help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush finds no closed pipe
        return 0
    except (HydraException, OmegaConfBaseException) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        print(f"error: {printable(_first_lines(error))}", file=sys.stderr)
        return USER_ERROR_STATUS
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)


def end_job(status: int) -> None:
    """Leave with the exit status of a job's processes, if it is not 0.

    In a sweep a failed job raises, so that the next one has its turn; a signal ends the sweep.
    """
    if status and in_sweep() and status not in (STOPPED, INTERRUPTED_STATUS):
        raise RuntimeError(f"the job's processes ended with exit status {status}; see the messages above")
    if status:
        sys.exit(status)


def in_sweep() -> bool:
    """Whether the present job is one of a multirun."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def output_dir() -> str:
    """The folder of the present job."""
    return str(HydraConfig.get().runtime.output_dir)


def short_name(text: str) -> str:
    """A folder name made of a job's overrides: as it is where short, its beginning and a hash where long."""
    safe = text.replace("/", "-")
    if len(safe) <= LONGEST_FOLDER_NAME:
        return safe or "job"
    digest = hashlib.blake2b(safe.encode(), digest_size=6).hexdigest()
    return f"{safe[: LONGEST_FOLDER_NAME - 13]}-{digest}"


@contextmanager
def _telling_of_slurm() -> Iterator[None]:
    """Make submitit's complaint that there is no SLURM a user's error."""
    try:
        yield
    except RuntimeError as error:
        if "slurm cluster" not in str(error):
            raise
        hint = "start the sweep on a machine that has srun and sbatch, or leave the launcher out"
        raise UserError("there is no SLURM on this machine", where="hydra/launcher", hint=hint) from error


def _first_lines(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and "object_type=" not in line]
    return "\n".join([*lines[:24], "  hint: `--cfg job` shows every key, `--help` the groups and their choices"])
