"""What torchrun or SLURM say about the processes that they have started, in torchrun's variables."""

import os
import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 15_000, 20_000


def launched_from_outside() -> bool:
    """Whether torchrun or SLURM has already started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def adopt_outside_launch() -> None:
    """Set the variables that torchrun sets where SLURM has started the processes."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(from_slurm(os.environ))


def outside_world_size() -> int | None:
    """How many processes torchrun or SLURM has started, or None where neither has."""
    if not launched_from_outside():
        return None
    return int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_STEP_NUM_TASKS"])


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Torchrun's variables from those of a task of a SLURM step (srun), or nothing where there is no such step.

    A batch script outside srun is one process whatever the number of tasks reserved, so the job's own
    SLURM_NTASKS is not asked.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2:
        return {}
    per_node = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    node = int(environment["SLURM_NODEID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS),
    }


def tasks_per_node(text: str) -> list[int]:
    """SLURM's `4(x2),3` as [4, 4, 3]."""
    counts = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must look like '4(x2),3', got {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first of SLURM's `gpu[03-05,9],login1`."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^,]*)", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST must name a host, got {nodes!r}")
    prefix, numbers, suffix = match.groups()
    return prefix + re.split("[,-]", numbers)[0] + suffix if numbers else prefix
