"""Conversion between sharded tensors (FSDP2's DTensors), of which every process has a part, and whole ones.

All functions also accept plain tensors, which have a single part. Gathering is a collective: all processes must call
it together, for the same tensors in the same order.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from hdm_lightning.training.strategies import processes


def is_sharded(network: nn.Module) -> bool:
    """Return whether `parallelize.shard_network` has sharded the network's parameters."""
    return isinstance(network, FSDPModule)


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's parts of the tensors; writing to them writes to the tensors."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(value: Any) -> Any:
    """Return the value with each sharded tensor in it whole on the CPU of the first process, and None on the others.

    Tensors are gathered one at a time, so that no device ever has all of them.
    """
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if processes.rank() == 0 else None
    if isinstance(value, Mapping):
        return {key: whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [whole(each) for each in value]
    return value


def split_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return a whole tensor, present on every process, sharded like `model` if that is sharded and has its shape."""
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    on_device = tensor.to(model.to_local().device)
    return distribute_tensor(on_device, model.device_mesh, model.placements, src_data_rank=None)


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Call `module.load_state_dict` with whole tensors."""
    own = module.state_dict()
    split = {name: split_like(value, own[name]) if name in own else value for name, value in state.items()}
    module.load_state_dict(split, strict=strict)


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Call `optimizer.load_state_dict` with whole moments, numbered by group order as in its own state dict."""
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    moments = {number: _split_moments(each, parameters[number]) for number, each in state["state"].items()}
    optimizer.load_state_dict({**state, "state": moments})


def _split_moments(moments: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    return {key: split_like(each, parameter) if torch.is_tensor(each) else each for key, each in moments.items()}


def copy_whole(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy whole tensors to the targets, which may be sharded."""
    split = [split_like(source, target) for source, target in zip(sources, targets, strict=True)]
    torch._foreach_copy_(local_parts(targets), local_parts(split))


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm () over all tensors, the same on every process."""
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
