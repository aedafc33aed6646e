"""Bytes of tensors alive at once: of work that is done, or rehearsed on tensors with shapes and without contents."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The first step allocates the optimizer's moments at its end, so the second one is the fullest.
_STEPS = 2


class LiveMemory(TorchDispatchMode):
    """Follows every storage that operations make, until it dies.

    Used as a context manager around the work; tensors that exist before it are counted if given to `hold`. The
    library's own workspaces and what an allocator keeps back are not seen. On CUDA the allocator's counters are the
    better source.

    Attributes:
        bytes: alive now.
        peak_bytes: the most that was alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak_bytes = 0
        self._seen: dict[int, int] = {}

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _key(leaf) not in self._seen]
        if made:
            given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for tensor in made:
                if _key(tensor) not in given:  # a view of a tensor that is not counted is not counted either
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
        # The Python object of a storage lives as long as the storage itself, wherever it is held.
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.bytes -= self._seen.pop(key, 0)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class TrainingStep(Protocol):
    """A step to rehearse, with all that it works on.

    Attributes:
        networks: all networks, the model first, frozen ones included.
        trained: parameters that get gradients and moments.
        averages: copies of weights.
    """

    networks: list[nn.Module]
    trained: list[nn.Parameter]
    averages: list[Tensor]

    def __call__(self, micro_batches: int) -> None:
        """One optimizer step."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors on one device; libraries' workspaces and the allocator's slack come on top."""

    parameters: int  # of the model (not bytes)
    weights: int  # of all networks
    gradients: int  # of what is trained
    moments: int  # two for each trained weight
    averages: int  # of the model's weights
    peak: int  # the most that is alive at once, all of the above included where they are alive then

    @property
    def kept(self) -> int:
        """What stays from step to step."""
        return self.weights + self.moments + self.averages

    @property
    def passing(self) -> int:
        """What comes and goes within a step: activations, gradients, temporaries."""
        return self.peak - self.kept


def step_memory(build: Callable[[], TrainingStep], *, micro_batches: int = 1) -> StepMemory:
    """Rehearse training steps in eager mode on fake tensors.

    Kernels are those of a CPU, whose attention keeps no square matrix, as a GPU's does not.

    Args:
        build: makes the step; all libraries that it needs are imported already, since modules that are imported
            within a rehearsal would make empty constants.
        micro_batches: of an optimizer step; with several, gradients wait beside activations.
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
