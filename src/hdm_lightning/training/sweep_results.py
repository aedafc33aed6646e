"""Results of a sweep: one row per job, read from the jobs' folders, as summary.csv, .md and .png."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hdm_lightning.json_files import LARGEST_BYTES, object_or_empty, require_shallow
from hdm_lightning.regular_files import read_regular
from hdm_lightning.training import run_folder
from hdm_lightning.training.callbacks.keep_ledger import Ledger
from hdm_lightning.whole_files import write_bytes, write_text

FAILED = "failed.json"
SEED = "seed"
VAE_OBJECTIVE = "reconstruction/l1"


@dataclass(frozen=True)
class JobResult:
    """The result of one job.

    Attributes:
        folder: the job's folder.
        settings: its overrides, key to value as text.
        status: `done`, `failed` or `unfinished`.
        objective: the value that a sweeper minimizes, see `objective`; None unless done.
        losses: all figures of the job's last validation.
        device_hours, cost_usd: spent, including restarts.
        error: first line of the error if it failed.
        baseline: whether its settings, except the seed, are those of the configuration without the sweep.
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
    """Jobs that differ only in their seed.

    Attributes:
        name: their overrides, `key=value` with commas, without seeds and without values that all jobs share.
        values: the objectives of the jobs that are done.
        baseline: as in `JobResult`.
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
        """Standard deviation over seeds; NaN for a single seed."""
        return stdev(self.values) if len(self.values) > 1 else math.nan


def objective(run_dir: Path) -> float | None:
    """Return what a sweeper minimizes: the last validation loss of the exported weights (the first average), or None.

    For an autoencoder it is the L1 error of its reconstructions.
    """
    losses = final_losses(run_dir)
    if VAE_OBJECTIVE in losses:
        return losses[VAE_OBJECTIVE]
    averaged = [value for name, value in losses.items() if name != "raw"]
    return next(iter([*averaged, *losses.values()]), None)


def final_losses(run_dir: Path) -> dict[str, float]:
    """Return the figures of the last stage's last validation, in the order in which they were measured."""
    done = sorted(run_dir.glob(f"*/{run_folder.DONE}"))
    if not done:
        return {}
    found = object_or_empty(done[-1])
    figures = found.get("measures") or found.get("validation") or {}
    numbers = figures.items() if isinstance(figures, dict) else ()
    return {name: float(value) for name, value in numbers if isinstance(value, int | float)}


def read_results(sweep_dir: Path, base: Mapping[str, Any] | None = None) -> list[JobResult]:
    """Return all jobs of a sweep, those that are done first, by their objective.

    The baseline is the job whose overrides are those of `base`: the value of each overridden key without the sweep.
    """
    folders = _folders(sweep_dir)
    settings = {folder: _overrides(folder) for folder in folders}
    varied = _varied(list(settings.values()))
    results = [_result(folder, settings[folder], varied, base) for folder in folders]
    return sorted(results, key=lambda job: (job.status != "done", _sortable(job.objective), job.folder.name))


def overridden_keys(sweep_dir: Path) -> list[str]:
    """Return every key that some job overrides."""
    return sorted({key for folder in _folders(sweep_dir) for key in _overrides(folder)})


def settings_of(results: list[JobResult]) -> list[Setting]:
    """Return the jobs that are done grouped over seeds, best first."""
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
    book = Ledger(folder / run_folder.LEDGER, writes=False)
    return JobResult(
        folder=folder,
        settings=settings,
        status=status,
        objective=objective(folder) if status == "done" else None,
        losses=final_losses(folder) if status == "done" else {},
        device_hours=book.spent("device_hours"),
        cost_usd=book.spent("cost_usd"),
        error=str(object_or_empty(failed).get("error", "")) if status == "failed" else "",
        baseline=base is not None and all(_same(settings.get(k), base.get(k)) for k in varied - {SEED}),
    )


def _same(text: str | None, value: Any) -> bool:
    """Return whether an override (None: there is none) leaves the value unchanged."""
    return text is None or text == str(value) or _parsed(text) == value


def _parsed(text: str) -> Any:
    """Return the value of an override's text as Hydra reads it; the text itself if it cannot."""
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return text


def _overrides(folder: Path) -> dict[str, str]:
    try:
        text = read_regular(folder / ".hydra" / "overrides.yaml", LARGEST_BYTES).decode("utf-8")
        require_shallow(text)
        lines = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        lines = None
    pairs = [str(line).partition("=") for line in (lines if isinstance(lines, list) else ())]
    return {key.lstrip("+~"): value for key, _, value in pairs}


def _varied(settings: list[dict[str, str]]) -> set[str]:
    """Return the keys whose values differ between jobs."""
    keys = {key for each in settings for key in each}
    return {key for key in keys if len({each.get(key) for each in settings}) > 1}


def _sortable(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


ROW_HEIGHT_IN, WIDTH_IN = 0.32, 9.0
DOT, MEAN, BASELINE = "#2463c4", "#1d2129", "#c2551b"


def summarise(sweep_dir: Path, base: Mapping[str, Any] | None = None) -> list[JobResult]:
    """Write the summary into the sweep's folder and return its rows, best first; see `read_results`."""
    results = read_results(sweep_dir, base)
    settings = settings_of(results)
    write_text(sweep_dir / "summary.csv", table_csv(results))
    write_text(sweep_dir / "summary.md", table_markdown(sweep_dir.name, results, settings))
    picture = chart_png(settings)
    if picture is not None:
        write_bytes(sweep_dir / "summary.png", picture)
    return results


def table_csv(results: list[JobResult]) -> str:
    """Return one row per job: folder, status, objective, every overridden key, every final figure, and the cost."""
    keys = sorted({key for job in results for key in job.settings})
    figures = sorted({name for job in results for name in job.losses})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", "status", "baseline", "objective", *keys, *figures, "device_hours", "cost_usd", "error"])
    for job in results:
        row = [job.folder.name, job.status, "yes" if job.baseline else "", _plain(job.objective)]
        row += [job.settings.get(key, "") for key in keys] + [_plain(job.losses.get(name)) for name in figures]
        writer.writerow([*row, _plain(job.device_hours), _plain(job.cost_usd), job.error])
    return text.getvalue()


def table_markdown(name: str, results: list[JobResult], settings: list[Setting]) -> str:
    """Return a table of the settings with mean and deviation over seeds, then one of every job; best first."""
    done = sum(job.status == "done" for job in results)
    lines = [f"# Sweep {name}", "", f"{done} of {len(results)} jobs done. Lower is better.", ""]
    lines += ["| setting | seeds | objective | ± over seeds |", "|---|---|---|---|"]
    for setting in settings:
        spread = "" if math.isnan(setting.deviation) else f"{setting.deviation:.2g}"
        mark = " **(baseline)**" if setting.baseline else ""
        lines.append(f"| {_cell(setting.name)}{mark} | {len(setting.values)} | {setting.mean:.5g} | {spread} |")
    lines += ["", "| job | status | objective | device-hours | USD |", "|---|---|---|---|---|"]
    for job in results:
        told = f"{job.status}: {job.error}" if job.error else job.status
        found = "" if job.objective is None else f"{job.objective:.5g}"
        row = (_cell(job.folder.name), _cell(told), found, f"{job.device_hours:.3f}", f"{job.cost_usd:.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, ""])


def chart_png(settings: list[Setting]) -> bytes | None:
    """Return a chart: best setting on top, a dot per job, a bar at the mean; None without matplotlib or jobs."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (optional)
    except ModuleNotFoundError:
        return None
    if not settings:
        return None
    figure = Figure(figsize=(WIDTH_IN, 1.1 + ROW_HEIGHT_IN * len(settings)), layout="constrained")
    axes = figure.subplots()
    for row, setting in enumerate(settings):
        axes.plot(setting.values, [row] * len(setting.values), "o", color=DOT, alpha=0.6)
        axes.plot(setting.mean, row, "|", color=MEAN, markersize=16, markeredgewidth=2)
        if setting.baseline:
            axes.axvline(setting.mean, color=BASELINE, linestyle="--", linewidth=1, label="baseline")
            axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(range(len(settings)), [setting.name for setting in settings])
    axes.invert_yaxis()
    axes.set_xlabel("final objective (lower is better); | mean over seeds")
    axes.grid(axis="x", alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
