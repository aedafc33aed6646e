"""Communication between the processes of a training; every function also works without a process group."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hdm_lightning.errors import UserError

Answer = TypeVar("Answer")
_MEETINGS = count()
LONGEST_WAIT = timedelta(days=2)


def distributed() -> bool:
    """Return whether there is a process group with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if distributed() else 1


def summed(values: Tensor) -> Tensor:
    """Return the element-wise sum over processes."""
    if distributed():
        values = values.clone()
        dist.all_reduce(values)
    return values


def averaged(values: Tensor) -> Tensor:
    """Return the element-wise mean over processes, without waiting for the device.

    Lightning's `self.log(…, sync_dist=True)` has a barrier before each mean, which blocks the host.
    """
    return summed(values) / world_size() if distributed() else values


def greatest(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the maximum of each value over processes, on every process, with one exchange for all values.

    This waits for the device, so do not call it in every step on one.
    """
    if not distributed():
        return list(values)
    held = torch.tensor(list(values), device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return [float(value) for value in held.tolist()]


def decided_by_first(decide: Callable[[], Answer]) -> Answer:
    """Call `decide` on the first process only, and return its result on every process.

    Raises:
        UserError: `decide` raised it on the first process; raised alike on every process.
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
    """Return the first process's value on every process."""
    if not distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of their ranks, on every process."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for every process."""
    if distributed():
        dist.barrier()


def wait_for_first() -> None:
    """Wait for the first process, which may take hours for exports or uploads before it gets here.

    A barrier on CUDA times out after ten minutes. Every process must call this the same number of times.
    """
    number = next(_MEETINGS)
    if not distributed():
        return
    store, key = dist.distributed_c10d._get_default_store(), f"hdm/first/{number}"  # of the process group's rendezvous
    if rank() == 0:
        store.set(key, "here")
    else:
        store.wait([key], LONGEST_WAIT)
    barrier()
