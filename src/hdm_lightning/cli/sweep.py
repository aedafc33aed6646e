"""Sweeps: a failed job is recorded without stopping the others, and a summary is written at the end."""

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line, printable
from hdm_lightning.whole_files import write_json

FAILED = "failed.json"
"""File in a job's folder if its last attempt failed; `training.sweep_results` reads it."""

OF_SWEEPERS = ("multirun.yaml", "optimization_results.yaml")
"""Files that Hydra and its Optuna sweeper write next to the jobs' folders."""


class JobFailed(Exception):
    """A job of a sweep failed; its folder has the details. No traceback is kept, as it would hold the job's memory."""


@dataclass
class _Sweep:
    """The sweep that this process runs."""

    folder: Path
    config: DictConfig

    def base_value(self, key: str) -> Any:
        """Return the value of a key or group without the sweep."""
        choices = self.config.hydra.runtime.choices
        return choices[key] if key in choices else OmegaConf.select(self.config, key)


_present: list[_Sweep] = []


class NoteSweep(Callback):
    """Hydra callback that records the sweep of this process for `finish_sweep` before Hydra writes its files.

    Hydra writes through symbolic links, and a folder may come from someone else, so links are removed first.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remove links from the run's folder."""
        _remove_links(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record the folder and the configuration composed without the swept overrides."""
        folder = Path(str(config.hydra.sweep.dir))
        for job in folder.glob("*/"):
            _remove_links(job)
        for name in OF_SWEEPERS:
            _remove_link(folder / name)
        _present[:] = [_Sweep(folder.absolute(), config)]


def _remove_links(folder: Path) -> None:
    own = folder / ".hydra"
    _remove_link(own)
    for file in own.glob("*"):
        _remove_link(file)


def _remove_link(place: Path) -> None:
    if place.is_symlink():
        place.unlink()


def note_failure(folder: Path, error: Exception) -> JobFailed:
    """Print a job's error, write it to the job's folder, and release the memory that its frames hold."""
    trace = "".join(traceback.format_exception(error))
    fixable = isinstance(error, UserError)
    told = str(error) if fixable else f"{type(error).__name__}: {error}"
    first = told.splitlines()[0]
    print(printable(told if fixable else trace), file=sys.stderr)
    write_json(folder / FAILED, {"error": first, "trace": trace})
    _forget(error)
    return JobFailed(f"{folder.name}: {first}")


def _forget(error: BaseException | None) -> None:
    """Drop the frames of an error and of its causes."""
    if error is not None:
        error.__traceback__ = None
        _forget(error.__cause__)
        _forget(error.__context__)


def forget_sweep() -> None:
    """Forget a sweep that an earlier call in this process began and could not finish."""
    _present.clear()


def finish_sweep() -> int:
    """Write and print the summary of the finished sweep; return the exit status, 1 if a job failed."""
    if not _present:
        return 0
    from hdm_lightning.training.sweep_results import overridden_keys, summarise  # noqa: PLC0415 (torch takes seconds)

    sweep = _present.pop()
    results = summarise(sweep.folder, {key: sweep.base_value(key) for key in overridden_keys(sweep.folder)})
    failed = [job for job in results if job.status == "failed"]
    done = sum(job.status == "done" for job in results)
    print(f"{done} of {len(results)} jobs done, {len(failed)} failed; {sweep.folder / 'summary.md'}")
    for job in failed:
        print(f"  failed: {job.folder.name}: {in_one_line(job.error)}")
    return 1 if failed else 0
