"""Shared by studies of many short trainings: trainings in this process, and jobs that resume where they stopped.

A job is a function that returns plain numbers. Its result is written atomically, together with where and when it was
made; a job that already has a result is skipped, and one that fails is reported and tried again on the next start.

`python -m experiments.study_jobs FROM TO` copies the results of another checkout.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.cli.overrides import composed
from hdm_lightning.profiling.system import cpu_name
from hdm_lightning.training.job import check_job
from hdm_lightning.training.launch import launch
from hdm_lightning.training.schedule import run_schedule
from hdm_lightning.whole_files import write_text

TOP = Path(__file__).parents[1]


def train(command: str, overrides: Sequence[str], run_dir: Path) -> None:
    """Run one training of `hdm-train` (command `train`) or `hdm-train-vae` (`train_vae`) in this process, on one core.

    Raises:
        RuntimeError: it failed.
    """
    one_core = ["trainer=cpu", "trainer.devices=1", "hardware.threads=1", "logger=none"]
    job = check_job(composed(command, [*overrides, *one_core, f"run_dir={run_dir}"]))
    status = launch(run_schedule, job.order(), job.processes)
    if status:
        raise RuntimeError(f"{run_dir} ended with status {status}")


def run_jobs(jobs: dict[str, Callable[[], dict[str, Any]]], results: Path, *, scratch: Path) -> None:
    """Run every job that has no result yet, in order.

    Args:
        jobs: by the name of their result's file.
        results: folder of the results, `NAME.json`.
        scratch: parent of each job's own folder `NAME`, which is deleted once its result is written.
    """
    results.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, (name, job) in enumerate(jobs.items(), start=1):
        path = results / f"{name}.json"
        if path.exists():
            continue
        print(f"{datetime.now(UTC):%H:%M:%S} {number}/{len(jobs)} {name}", flush=True)
        begun, load = time.monotonic(), os.getloadavg()[0]
        try:
            found = job()
        except Exception:
            failed.append(name)
            print(traceback.format_exc(), flush=True)
            continue
        made = {**circumstances(), "wall_seconds": round(time.monotonic() - begun, 1), "load_before": round(load, 2)}
        write_result(path, {"job": name, **found, "made": made})
        shutil.rmtree(scratch / name, ignore_errors=True)
    print(
        f"{datetime.now(UTC):%H:%M:%S} {len(jobs) - len(failed)} of {len(jobs)} jobs done; failed: {failed}", flush=True
    )


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write one key per line, so that a hundred results stay small and can be compared."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in result.items())
    write_text(path, f"{{\n{lines}\n}}\n")


@contextmanager
def cpu_seconds(into: dict[str, float], name: str) -> Iterator[None]:
    """Record the CPU time that a block takes in this process."""
    begun = time.process_time()
    yield
    into[name] = round(time.process_time() - begun, 2)


def circumstances() -> dict[str, Any]:
    """Return the commit, machine and time of a result."""
    return {**_machine(), "time": datetime.now(UTC).isoformat(timespec="seconds")}


@cache
def _machine() -> dict[str, Any]:
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=TOP, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    """Copy results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="FROM")
    parser.add_argument("target", type=Path, metavar="TO")
    arguments = parser.parse_args()
    for path in sorted(arguments.source.glob("*.json")):
        write_result(arguments.target / path.name, json.loads(path.read_text()))


if __name__ == "__main__":
    main()
