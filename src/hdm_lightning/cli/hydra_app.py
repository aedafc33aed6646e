"""Run Hydra commands; composition and user errors are reported briefly, with exit status 2."""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hdm_lightning.cli.command import (
    INTERRUPTED_STATUS,
    TRACEBACK_VARIABLE,
    USER_ERROR_STATUS,
    require_platform,
    run_command,
)
from hdm_lightning.cli.overrides import CONF, EXPLAIN, arranged, hint_for, short_name, unparsable
from hdm_lightning.cli.sweep import FAILED, JobFailed, finish_sweep, forget_sweep, note_failure
from hdm_lightning.errors import UserError
from hdm_lightning.printable import printable
from hdm_lightning.training.former_keys import present_keys
from hdm_lightning.version import __version__

_UNTOLD = re.compile("object_type=|^To append to your config use")
STOPPED = 143
"""Exit status of a job that saved and ended because of a signal."""


def run_hydra(task: Callable[[DictConfig], Any], config_name: str) -> int:
    """Compose `config_name` with the command line, call `task(config)`, and return the exit status.

    A task returns None or, for sweepers, a number, raises `UserError`, or exits. Errors are reported after Hydra
    ends, since it would print the overrides above them.
    """
    if "--version" in sys.argv[1:]:
        print(f"hdm-lightning {__version__}")
        return 0
    error: BaseException | None = None
    errors = JobErrors()
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Hydra would show its messages about fonts
    try:
        require_platform(sys.platform)
        OmegaConf.register_new_resolver("hdm.short", short_name, replace=True)
        if EXPLAIN in sys.argv[1:]:
            from hdm_lightning.cli.explained import explain  # noqa: PLC0415 (only if requested)

            words = [word for word in sys.argv[1:] if word != EXPLAIN]
            print(explain(present_keys(words, config_name), config_name))
            return 0
        forget_sweep()
        sys.argv[1:] = arranged(present_keys(sys.argv[1:], config_name))
        decorate = hydra.main(config_path=f"pkg://{CONF}", config_name=config_name, version_base="1.3")
        with _full_errors():
            decorate(errors(task))()
        error = errors.mistake
    except (Exception, KeyboardInterrupt) as raised:
        error = raised if errors.begun else _place_of_hydra(raised)
    return run_command(lambda: _end(error, config_name))


def _place_of_hydra(error: BaseException) -> BaseException:
    """Return a UserError if Hydra could not create a job's folder; other errors unchanged."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError) or not isinstance(error.filename, str):
        return error
    what, hint = f"cannot be created ({error.strerror})", "set another path: run_dir=…, in a sweep hydra.sweep.dir=…"
    return UserError(what, where=error.filename, hint=hint)


def _end(error: BaseException | None, config_name: str) -> int:
    """Return the exit status of an application, or raise its error."""
    if error is None or isinstance(error, JobFailed):
        return finish_sweep()
    if isinstance(error, RuntimeError) and "slurm cluster" in str(error):  # raised by submitit
        hint = "start the sweep on a machine that has srun and sbatch, or omit the launcher"
        raise UserError("SLURM is not available on this machine", where="hydra/launcher", hint=hint) from error
    if isinstance(error, OverrideParseException):
        raise unparsable(error.override) from error
    composing = isinstance(error, HydraException | OmegaConfBaseException)
    if composing and os.environ.get(TRACEBACK_VARIABLE) != "1":
        print(f"error: {printable(_first_lines(error, config_name))}", file=sys.stderr)
        return USER_ERROR_STATUS
    raise error


class JobErrors(ContextDecorator):
    """Handle a job's errors: in a sweep, record them in the job's folder; otherwise keep a `UserError` for later.

    Attributes:
        begun: whether a job has started.
        mistake: the `UserError`, if there was one.

    Raises:
        JobFailed: a job of a sweep failed.
    """

    def __init__(self) -> None:
        self.begun = False
        self.mistake: UserError | None = None

    def __enter__(self) -> None:
        self.begun = True
        if in_sweep():
            (Path(output_dir()) / FAILED).unlink(missing_ok=True)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if in_sweep() and isinstance(error, Exception):
            failed = note_failure(Path(output_dir()), error)
            del error, trace  # this frame outlives the job
            raise failed
        if isinstance(error, UserError) and os.environ.get(TRACEBACK_VARIABLE) != "1":
            self.mistake = error
        return self.mistake is not None


@contextmanager
def _full_errors() -> Iterator[None]:
    """Make Hydra raise errors instead of printing them and exiting."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)


def end_job(status: int) -> None:
    """Exit with the status of a job's processes, if it is not 0.

    In a sweep a failed job raises, so that the next one can run; a signal ends the sweep.
    """
    if status and in_sweep() and status not in (STOPPED, INTERRUPTED_STATUS):
        raise RuntimeError(f"the job's processes ended with exit status {status}; see the messages above")
    if status:
        sys.exit(status)


def in_sweep() -> bool:
    """Return whether the current job is part of a multirun."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def output_dir() -> str:
    """Return the output folder of the current job."""
    return str(HydraConfig.get().runtime.output_dir)


def _first_lines(error: BaseException, config_name: str) -> str:
    """Return Hydra's message without its internals, and a hint."""
    message, _, _ = str(error).partition("Config search path:")
    lines = [line for line in message.splitlines() if line.strip() and not _UNTOLD.search(line)]
    return "\n".join([*lines[:24], f"  hint: {hint_for(str(error), config_name)}"])
