"""What the processes of a run tell each other; every function also works without a process group."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from hdm_lightning import one_machine
from hdm_lightning.errors import UserError
from hdm_lightning.training.launching.launched import adopt_outside_launch

Answer = TypeVar("Answer")


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


def distributed() -> bool:
    """Whether there is a process group with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if distributed() else 1


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
        told = ", ".join(str(counts[machine]) for machine in sorted(counts))
        raise UserError(
            f"the machines have {told} processes, but each must have as many as the others",
            where="trainer.nodes",
            hint=f"start {min(counts.values())} on each (torchrun --nproc-per-node, srun --ntasks-per-node), "
            "or leave out the machines with fewer devices",
        )


def cluster_environment() -> ClusterEnvironment:
    """What tells Lightning the ranks: torchrun's variables, whatever else it would find in the environment."""
    return TorchElasticEnvironment() if distributed() else LightningEnvironment()


def summed(values: Tensor) -> Tensor:
    """The element-wise sum over processes."""
    if distributed():
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_of_each(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Whether each flag is set on any process; the same answers everywhere, by one exchange for all."""
    if not distributed():
        return list(flags)
    values = torch.tensor([float(flag) for flag in flags], device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def decided_by_first(decide: Callable[[], Answer]) -> Answer:
    """What the first process finds out, on every process; the others do not look.

    Raises:
        UserError: on every process alike, the one that the first process ran into.
    """
    answer, error = None, None
    if rank() == 0:
        try:
            answer = decide()
        except UserError as mistake:
            error = (mistake.what, mistake.where, mistake.hint)
    answer, error = from_first((answer, error))
    if error is not None:
        what, where, hint = error
        raise UserError(what, where=where, hint=hint)
    return answer


def from_first(value: Any) -> Any:
    """What the first process holds, on every process."""
    if not distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """The plain value of every process, in the order of their numbers, on every process."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for every process."""
    if distributed():
        dist.barrier()
