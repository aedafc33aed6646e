"""A sweep's summary: `summary.csv`, `summary.md` and, where matplotlib is installed, `summary.png`."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdm_lightning.training.sweeps.results import JobResult, Setting, read_results, settings_of
from hdm_lightning.whole_files import write_atomically

ROW_HEIGHT_IN, WIDTH_IN = 0.32, 9.0
DOT, MEAN, BASELINE = "#2463c4", "#1d2129", "#c2551b"


def summarise(sweep_dir: Path, base: Mapping[str, Any] | None = None) -> list[JobResult]:
    """Write the summary into the sweep's folder and return its rows, best first.

    Args:
        sweep_dir: the sweep's folder.
        base: value of each overridden key without the sweep, see `read_results`.
    """
    results = read_results(sweep_dir, base)
    settings = settings_of(results)
    _write(sweep_dir / "summary.csv", table_csv(results).encode())
    _write(sweep_dir / "summary.md", table_markdown(sweep_dir.name, results, settings).encode())
    picture = chart_png(settings)
    if picture is not None:
        _write(sweep_dir / "summary.png", picture)
    return results


def table_csv(results: list[JobResult]) -> str:
    """One row a job: folder, status, objective, every overridden key, every final figure, what it cost."""
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
    """Settings with mean and deviation over seeds, then every job; best first."""
    done = sum(job.status == "done" for job in results)
    lines = [f"# Sweep {name}", "", f"{done} of {len(results)} jobs done. Less is better.", ""]
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
    """A dot a job and a bar at the mean, a row a setting, best on top; None without matplotlib or without a job."""
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
    axes.set_xlabel("final objective (less is better); | mean over seeds")
    axes.grid(axis="x", alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
