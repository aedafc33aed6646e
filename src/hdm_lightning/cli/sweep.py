"""Sweeps: a job that fails is noted and does not hold up the others, and a summary stands at the end."""

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
"""In a job's folder while its last attempt has failed; `training.sweep_results` reads it."""

OF_SWEEPERS = ("multirun.yaml", "optimization_results.yaml")
"""What Hydra and its Optuna sweeper write beside the jobs' folders."""


class JobFailed(Exception):
    """A job of a sweep failed; its folder says how. Without the trace, which would keep the job's memory alive."""


@dataclass
class _Sweep:
    """The sweep that this process leads."""

    folder: Path
    config: DictConfig

    def base_value(self, key: str) -> Any:
        """What a key or group is without the sweep."""
        choices = self.config.hydra.runtime.choices
        return choices[key] if key in choices else OmegaConf.select(self.config, key)


_present: list[_Sweep] = []


class NoteSweep(Callback):
    """Hydra callback that remembers which sweep this process leads, for `finish_sweep`, before Hydra writes its files.

    Hydra would write these through links, and a folder may come from somebody else: links are removed first.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the run's folder."""
        _remove_links(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember folder and configuration, as composed without what is swept."""
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
    """Print why a job failed and write it into its folder; gives up the memory that the error's frames hold."""
    trace = "".join(traceback.format_exception(error))
    fixable = isinstance(error, UserError)
    told = str(error) if fixable else f"{type(error).__name__}: {error}"
    first = told.splitlines()[0]
    print(printable(told if fixable else trace), file=sys.stderr)
    write_json(folder / FAILED, {"error": first, "trace": trace})
    _forget(error)
    return JobFailed(f"{folder.name}: {first}")


def _forget(error: BaseException | None) -> None:
    """Give up the frames of an error and of those that it came of."""
    if error is not None:
        error.__traceback__ = None
        _forget(error.__cause__)
        _forget(error.__context__)


def finish_sweep() -> int:
    """Write and tell the summary of the sweep that has just ended; returns the exit status, 1 if a job failed."""
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
