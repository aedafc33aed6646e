"""Work that a device does while it is still busy with what it was given before."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class SideStream:
    """A CUDA stream beside the current one; on any other device everything is done at once, in its order.

    What is put on it waits for nothing that the current stream has been given already. It must read only what was made
    on it, or what stays as it is. Its results may be used once they are taken over, on the current stream.

    Args:
        device: of both streams. What is on its way there on the current stream, such as weights, is waited for here.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def put(self) -> AbstractContextManager[object]:
        """Inside the with statement the device's work goes on this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """From here on the current stream may use these tensors of this one; it waits for them, the host does not."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)  # else its memory, once freed, is this stream's before the other is done
