"""What the processes of a training tell each other; every function also works without a process group."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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


def any_of_each(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Whether each flag is set on any process; the same answers everywhere, by one exchange for all."""
    if not distributed():
        return list(flags)
    values = torch.tensor([float(flag) for flag in flags], device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


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
