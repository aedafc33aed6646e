"""What the jobs of a sweep came to: one row a job, read from the jobs' folders."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from omegaconf import OmegaConf

from hdm_lightning.training import run_folder
from hdm_lightning.training.callbacks.keep_ledger import Ledger

FAILED = "failed.json"
SEED = "seed"
VAE_OBJECTIVE = "reconstruction/l1"


@dataclass(frozen=True)
class JobResult:
    """One job.

    Attributes:
        folder: the job's.
        settings: what it overrides, key to value as text.
        status: `done`, `failed` or `unfinished`.
        objective: what a sweeper minimises, see `objective`; None unless done.
        losses: all final figures of the job's last validation.
        device_hours, cost_usd: spent, restarts included.
        error: first line of why it failed.
        baseline: whether its settings are those of the configuration without the sweep, seeds aside.
    """

    folder: Path
    settings: dict[str, str]
    status: str
    objective: float | None
    losses: dict[str, float] = field(default_factory=dict)
    device_hours: float = 0.0
    cost_usd: float = 0.0
    error: str = ""
    baseline: bool = False


@dataclass(frozen=True)
class Setting:
    """Jobs that differ in their seed alone.

    Attributes:
        name: what they override, `key=value` with commas; seeds and what all jobs share left out.
        values: the objectives of those that are done.
        baseline: as of their jobs.
    """

    name: str
    values: tuple[float, ...]
    baseline: bool

    @property
    def mean(self) -> float:
        """Mean objective."""
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; not a number for a single one."""
        return stdev(self.values) if len(self.values) > 1 else math.nan


def objective(run_dir: Path) -> float | None:
    """What a sweeper minimises: the final validation loss of the exported weights (the first average), or None.

    For an autoencoder it is the L1 error of its reconstructions.
    """
    losses = final_losses(run_dir)
    if VAE_OBJECTIVE in losses:
        return losses[VAE_OBJECTIVE]
    averaged = [value for name, value in losses.items() if name != "raw"]
    return next(iter([*averaged, *losses.values()]), None)


def final_losses(run_dir: Path) -> dict[str, float]:
    """The figures of the last validation of the last stage, in the order in which they were taken."""
    done = sorted(run_dir.glob(f"*/{run_folder.DONE}"))
    if not done:
        return {}
    found = json.loads(done[-1].read_text())
    return dict(found.get("measures") or found.get("validation") or {})


def read_results(sweep_dir: Path, base: Mapping[str, Any] | None = None) -> list[JobResult]:
    """All jobs of a sweep, done ones first by their objective.

    Args:
        sweep_dir: the sweep's folder.
        base: value of each overridden key without the sweep, for finding the baseline.
    """
    folders = _folders(sweep_dir)
    settings = {folder: _overrides(folder) for folder in folders}
    varied = _varied(list(settings.values()))
    results = [_result(folder, settings[folder], varied, base) for folder in folders]
    return sorted(results, key=lambda job: (job.status != "done", _sortable(job.objective), job.folder.name))


def overridden_keys(sweep_dir: Path) -> list[str]:
    """Every key that some job overrides."""
    return sorted({key for folder in _folders(sweep_dir) for key in _overrides(folder)})


def settings_of(results: list[JobResult]) -> list[Setting]:
    """The done jobs gathered over seeds, best first."""
    varied = _varied([job.settings for job in results]) - {SEED}
    gathered: dict[str, list[JobResult]] = {}
    for job in results:
        if job.objective is not None:
            name = ", ".join(f"{key}={job.settings.get(key, '(default)')}" for key in sorted(varied))
            gathered.setdefault(name or "all jobs", []).append(job)
    settings = [
        Setting(name, tuple(job.objective for job in jobs if job.objective is not None), jobs[0].baseline)
        for name, jobs in gathered.items()
    ]
    return sorted(settings, key=lambda setting: _sortable(setting.mean))


def _folders(sweep_dir: Path) -> list[Path]:
    return sorted(path.parent.parent for path in sweep_dir.glob("*/.hydra/overrides.yaml"))


def _result(folder: Path, settings: dict[str, str], varied: set[str], base: Mapping[str, Any] | None) -> JobResult:
    failed = folder / FAILED
    status = "done" if run_folder.is_finished(folder) else "failed" if failed.exists() else "unfinished"
    events = Ledger(folder / run_folder.LEDGER, writes=False).events()
    return JobResult(
        folder=folder,
        settings=settings,
        status=status,
        objective=objective(folder) if status == "done" else None,
        losses=final_losses(folder) if status == "done" else {},
        device_hours=sum(event.get("device_hours", 0.0) for event in events),
        cost_usd=sum(event.get("cost_usd", 0.0) for event in events),
        error=json.loads(failed.read_text())["error"] if status == "failed" else "",
        baseline=base is not None and all(_same(settings.get(k), base.get(k)) for k in varied - {SEED}),
    )


def _same(text: str | None, value: Any) -> bool:
    """Whether an override (None: none is given) leaves the value as it is."""
    return text is None or text == str(value) or _parsed(text) == value


def _parsed(text: str) -> Any:
    """The value that an override's text stands for; nothing in it is resolved."""
    plain = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)
    return plain["value"] if isinstance(plain, dict) else None


def _overrides(folder: Path) -> dict[str, str]:
    lines = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
    assert isinstance(lines, list)
    pairs = [str(line).partition("=") for line in lines]
    return {key.lstrip("+~"): value for key, _, value in pairs}


def _varied(settings: list[dict[str, str]]) -> set[str]:
    """Keys whose values differ between jobs."""
    keys = {key for each in settings for key in each}
    return {key for key in keys if len({each.get(key) for each in settings}) > 1}


def _sortable(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value
