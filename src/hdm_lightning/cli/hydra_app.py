"""Hydra commands: composition errors and user errors on one screen with exit status 2."""

import hashlib
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
from hdm_lightning.cli.overrides import EXPLAIN, arranged, unparsable
from hdm_lightning.cli.sweep import FAILED, JobFailed, finish_sweep, note_failure
from hdm_lightning.errors import UserError
from hdm_lightning.printable import printable
from hdm_lightning.training.former_keys import present_keys
from hdm_lightning.version import __version__

LONGEST_FOLDER_NAME = 120
"""Bytes: file systems count in them."""
_UNTOLD = re.compile("object_type=|^To append to your config use")
STOPPED = 143
"""Exit status of a job that saved and ended because of a signal."""


def run_hydra(task: Callable[[DictConfig], Any], config_name: str) -> int:
    """Compose `config_name` with the command line, call `task(config)`, and return the exit status.

    A task returns None or, for sweepers, a number, raises `UserError`, or exits. Errors are reported after Hydra's
    end: it would print the overrides above them.
    """
    if "--version" in sys.argv[1:]:
        print(f"hdm-lightning {__version__}")
        return 0
    error: BaseException | None = None
    errors = JobErrors()
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Hydra would show what it says of its fonts
    try:
        require_platform(sys.platform)
        OmegaConf.register_new_resolver("hdm.short", short_name, replace=True)
        if EXPLAIN in sys.argv[1:]:
            from hdm_lightning.cli.explained import explain  # noqa: PLC0415 (only where it is asked for)

            words = [word for word in sys.argv[1:] if word != EXPLAIN]
            print(explain(present_keys(words, config_name), config_name))
            return 0
        sys.argv[1:] = arranged(present_keys(sys.argv[1:], config_name))
        decorate = hydra.main(config_path="pkg://hdm_lightning.conf", config_name=config_name, version_base="1.3")
        with _full_errors():
            decorate(errors(task))()
        error = errors.mistake
    except (Exception, KeyboardInterrupt) as raised:
        error = raised if errors.begun else _place_of_hydra(raised)
    return run_command(lambda: _end(error, config_name))


def _place_of_hydra(error: BaseException) -> BaseException:
    """What to tell where Hydra, before any job, cannot make the folder of one; other errors as they are."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError) or not isinstance(error.filename, str):
        return error
    what, hint = f"cannot be made ({error.strerror})", "name another place: run_dir=…, or hydra.sweep.dir=… in a sweep"
    return UserError(what, where=error.filename, hint=hint)


def _end(error: BaseException | None, config_name: str) -> int:
    """The exit status of an application that has ended with an error or without."""
    if error is None or isinstance(error, JobFailed):
        return finish_sweep()
    if isinstance(error, RuntimeError) and "slurm cluster" in str(error):  # submitit's complaint
        hint = "start the sweep on a machine that has srun and sbatch, or leave the launcher out"
        raise UserError("there is no SLURM on this machine", where="hydra/launcher", hint=hint) from error
    if isinstance(error, OverrideParseException):
        raise unparsable(error.override) from error
    composing = isinstance(error, HydraException | OmegaConfBaseException)
    if composing and os.environ.get(TRACEBACK_VARIABLE) != "1":
        print(f"error: {printable(_first_lines(error, config_name))}", file=sys.stderr)
        return USER_ERROR_STATUS
    raise error


class JobErrors(ContextDecorator):
    """What becomes of a job's errors: in a sweep its folder says how it failed, else the user's are kept for later.

    Attributes:
        begun: whether there was a job.
        mistake: the user's error, if there was one.

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
    """Let Hydra pass errors on instead of printing and exiting."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
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
    content = os.fsencode(safe)
    if len(content) <= LONGEST_FOLDER_NAME:
        return safe or "job"
    digest = hashlib.blake2b(content, digest_size=6).hexdigest()
    return f"{content[: LONGEST_FOLDER_NAME - 13].decode(errors='ignore')}-{digest}"


def _first_lines(error: BaseException, config_name: str) -> str:
    """Hydra's message without what says nothing to a user, and what was probably meant."""
    from hdm_lightning.cli.mistyped import hint_for  # noqa: PLC0415 (only after a mistake)

    message, _, _ = str(error).partition("Config search path:")
    lines = [line for line in message.splitlines() if line.strip() and not _UNTOLD.search(line)]
    return "\n".join([*lines[:24], f"  hint: {hint_for(str(error), config_name)}"])
