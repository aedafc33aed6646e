"""What the processes of a training exchange; every function also works without a process group."""

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
    """Whether there is a process group with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if distributed() else 1


def summed(values: Tensor) -> Tensor:
    """The element-wise sum over processes."""
    if distributed():
        values = values.clone()
        dist.all_reduce(values)
    return values


def averaged(values: Tensor) -> Tensor:
    """The element-wise mean over processes, for which a device need not be waited for.

    Lightning's `self.log(…, sync_dist=True)` has a barrier before each, which stops the host.
    """
    return summed(values) / world_size() if distributed() else values


def greatest(values: Sequence[float], device: torch.device) -> list[float]:
    """The greatest of each value over processes; the same answers everywhere, by one exchange for all.

    A device is waited for, so that this is not for every step of it.
    """
    if not distributed():
        return list(values)
    held = torch.tensor(list(values), device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return [float(value) for value in held.tolist()]


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


def wait_for_first() -> None:
    """Wait until the first process has come here, too, which may have hours of work to do: exports, uploads.

    A barrier on CUDA gives up after ten minutes. Every process must have called this as often.
    """
    number = next(_MEETINGS)
    if not distributed():
        return
    store, key = dist.distributed_c10d._get_default_store(), f"hdm/first/{number}"  # what a barrier's backend met with
    if rank() == 0:
        store.set(key, "here")
    else:
        store.wait([key], LONGEST_WAIT)
    barrier()
