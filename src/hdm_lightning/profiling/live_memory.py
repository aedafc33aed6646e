"""Peak bytes of live tensors, in real work or in a rehearsal on fake tensors."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The first step allocates the optimizer's moments at its end, so the second step has the peak.
_STEPS = 2


class LiveMemory(TorchDispatchMode):
    """Track every storage that operations allocate until it is freed.

    Use it as a context manager around the work; tensors that already exist are counted if passed to `hold`. Library
    workspaces and memory cached by the allocator are not seen. On CUDA, prefer the allocator's counters.

    Attributes:
        bytes: live bytes now.
        peak_bytes: most live bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak_bytes = 0
        self._seen: dict[int, int] = {}

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors that already exist."""
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count its new storages."""
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _key(leaf) not in self._seen]
        if made:
            given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for tensor in made:
                if _key(tensor) not in given:  # a view of an uncounted tensor is not counted either
                    self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = size
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        # The Python object of a storage lives as long as the storage itself.
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.bytes -= self._seen.pop(key, 0)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class TrainingStep(Protocol):
    """A step to rehearse, and its state.

    Attributes:
        networks: all networks, the model first, including frozen ones.
        trained: parameters that get gradients and moments.
        averages: copies of weights.
    """

    networks: list[nn.Module]
    trained: list[nn.Parameter]
    averages: list[Tensor]

    def __call__(self, micro_batches: int) -> None:
        """Take one optimizer step."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors on one device, without library workspaces and allocator overhead."""

    parameters: int  # number of parameters of the model
    weights: int  # of all networks
    gradients: int  # of trained parameters
    moments: int  # two per trained parameter
    averages: int  # of the model's weights
    peak: int  # most bytes alive at once, including the above

    @property
    def kept(self) -> int:
        """Bytes kept between steps."""
        return self.weights + self.moments + self.averages

    @property
    def passing(self) -> int:
        """Bytes allocated only within a step: activations, gradients, temporaries."""
        return self.peak - self.kept


def step_memory(build: Callable[[], TrainingStep], *, micro_batches: int = 1) -> StepMemory:
    """Rehearse training steps in eager mode on fake tensors.

    Kernels are those of a CPU, whose attention, like a GPU's, does not store the square score matrix.

    Args:
        build: builds the step; all libraries that it needs must already be imported, since constants of modules
            imported within a rehearsal would be fake tensors.
        micro_batches: micro-batches per optimizer step; with several, gradients are alive alongside activations.
    """
    with FakeTensorMode(), LiveMemory() as memory:
        step = build()
        for _ in range(_STEPS):
            step(micro_batches)
        trained = _bytes(step.trained)
        return StepMemory(
            parameters=sum(parameter.numel() for parameter in step.networks[0].parameters()),
            weights=sum(_bytes(network.state_dict().values()) for network in step.networks),
            gradients=trained,
            moments=2 * trained,
            averages=_bytes(step.averages),
            peak=memory.peak_bytes,
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
