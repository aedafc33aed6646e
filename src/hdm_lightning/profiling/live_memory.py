"""Peak bytes of live tensors, in real work or in a rehearsal on fake tensors."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
