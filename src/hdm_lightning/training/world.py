"""The processes of a run: how they join each other, and on how many machines they are."""

import os

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hdm_lightning import one_machine
from hdm_lightning.errors import UserError
from hdm_lightning.training.outside_launch import adopt_outside_launch
from hdm_lightning.training.strategies.processes import distributed, gathered, world_size


def join_group(accelerator: str) -> bool:
    """Join the process group when the environment says that there are several processes.

    Those of one machine's own launcher meet by a file, those of torchrun and SLURM at an address and a port.
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
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if distributed() else 1


def nodes() -> int:
    """How many machines the processes run on."""
    return world_size() // local_world_size()


def require_even_machines() -> None:
    """Every machine has as many processes as the others, which Lightning counts on.

    Raises:
        UserError: on every process alike, with the numbers.
    """
    counts = dict(gathered((int(os.environ.get("GROUP_RANK", "0")), local_world_size())))
    if len(set(counts.values())) > 1:
        counted = ", ".join(str(counts[machine]) for machine in sorted(counts))
        raise UserError(
            f"the machines have {counted} processes, but each must have as many as the others",
            where="trainer.num_nodes",
            hint=f"start {min(counts.values())} on each (torchrun --nproc-per-node, srun --ntasks-per-node), "
            "or leave out the machines with fewer devices",
        )


def cluster_environment() -> ClusterEnvironment:
    """What tells Lightning the ranks: torchrun's variables, whatever else it would find in the environment."""
    return TorchElasticEnvironment() if distributed() else LightningEnvironment()
