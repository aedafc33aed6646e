"""Work that a device does in parallel with work queued earlier."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class SideStream:
    """A CUDA stream next to the current one; on any other device, work runs at once and in order.

    Work on it does not wait for work already queued on the current stream. It must only read tensors that were created
    on it or do not change. Its results may be used on the current stream after `take_over`.

    Args:
        device: device of both streams; work queued so far on the current one, such as copies of weights, comes first.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def put(self) -> AbstractContextManager[object]:
        """Return a context in which the device's work is queued on this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Let the current stream use these tensors of this stream from now on; it waits for them, the host does not."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)  # otherwise this stream could reuse its memory too early
