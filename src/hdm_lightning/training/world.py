"""The processes of a run: who started them, how they form a group, and on how many machines they run."""

import os
import re
from collections.abc import Mapping

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hdm_lightning import one_machine
from hdm_lightning.errors import UserError
from hdm_lightning.training.strategies.processes import distributed, gathered, world_size

FIRST_PORT, PORTS = 15_000, 20_000


def launched_from_outside() -> bool:
    """Return whether torchrun or SLURM has started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def adopt_outside_launch() -> None:
    """Set torchrun's variables if SLURM has started the processes."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(from_slurm(os.environ))


def outside_world_size() -> int | None:
    """Return the number of processes that torchrun or SLURM has started, or None if neither has."""
    if not launched_from_outside():
        return None
    return int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_STEP_NUM_TASKS"])


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables from those of a SLURM step's task (srun); empty if there is no such step.

    A batch script outside srun is one process regardless of the number of tasks reserved, so the job's own
    SLURM_NTASKS is not used.
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
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or SLURMEnvironment.resolve_root_node_address(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS),
    }


def tasks_per_node(text: str) -> list[int]:
    """Return SLURM's `4(x2),3` as [4, 4, 3]."""
    counts = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must look like '4(x2),3', got {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def join_group(accelerator: str) -> bool:
    """Join the process group if the environment defines several processes; return whether it does.

    Processes started by this package's launcher meet at a file, those of torchrun and SLURM at an address and port.
    """
    adopt_outside_launch()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    if accelerator == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if accelerator == "cuda" else "gloo"
    if one_machine.MEETING_FILE in os.environ:
        one_machine.join(backend, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    else:
        dist.init_process_group(backend)
    # Lightning read the rank from the environment when it was imported, which in a spawned process is too early.
    rank_zero_only.rank = dist.get_rank()  # type: ignore[attr-defined]
    return True


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if distributed() else 1


def nodes() -> int:
    """Return the number of machines that the processes run on."""
    return world_size() // local_world_size()


def require_even_machines() -> None:
    """Check that every machine has the same number of processes, as Lightning assumes.

    Raises:
        UserError: on every process, with the numbers.
    """
    counts = dict(gathered((int(os.environ.get("GROUP_RANK", "0")), local_world_size())))
    if len(set(counts.values())) > 1:
        counted = ", ".join(str(counts[machine]) for machine in sorted(counts))
        raise UserError(
            f"the machines have {counted} processes, but each must have the same number",
            where="trainer.num_nodes",
            hint=f"start {min(counts.values())} on each (torchrun --nproc-per-node, srun --ntasks-per-node), "
            "or leave out the machines with fewer devices",
        )


def cluster_environment() -> ClusterEnvironment:
    """Return where Lightning reads the ranks: torchrun's variables, whatever else is in the environment."""
    return TorchElasticEnvironment() if distributed() else LightningEnvironment()
