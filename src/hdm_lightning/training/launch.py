"""Start one process per device around a worker function.

The command's own process stays a thin parent: Lightning's launcher would run the whole Hydra command
again in every process, and torchrun around a Hydra command makes a run folder per process.
"""

import os
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hdm_lightning.errors import UserError

Worker = Callable[[dict[str, Any]], int]


def launched_from_outside() -> bool:
    """Whether torchrun or SLURM has already started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def launch(worker: Worker, config: dict[str, Any], processes: int) -> int:
    """Run `worker(config)` on so many processes of this machine and return its exit status.

    One process, or processes that torchrun or SLURM have started, run the worker right here. The worker
    must be importable by name and the config plain, since other processes get both by pickling.
    """
    if processes == 1 or launched_from_outside():
        return worker(config)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        monitor_interval=0.2,
    )
    try:
        statuses = elastic_launch(settings, worker)(config)
    except ChildFailedError as failure:
        return _status_of(failure)
    except SignalException as interruption:
        return 128 + int(interruption.sigval)
    return max(statuses.values(), default=0)


def _status_of(failure: ChildFailedError) -> int:
    rank, first = failure.get_first_failure()
    if first.exitcode in (2, 143):
        return int(first.exitcode)
    raise UserError(
        f"process {rank} failed (exit status {first.exitcode}) and the others were stopped: {first.message}",
        where="training",
        mend="see the messages above; the same command continues from the last checkpoint",
    ) from failure
