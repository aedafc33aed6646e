"""Where a step's time goes: named sections, measured without waiting for the device on every step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SectionClock:
    """Adds up seconds per named section.

    On CUDA a section is two events on the stream, read when `drain` is called; elsewhere the host's clock.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: dict[str, float | torch.cuda.Event] = {}
        self.device = torch.device("cpu")

    def start(self, name: str) -> None:
        """Open a section."""
        self._open[name] = self._mark()

    def stop(self, name: str) -> None:
        """Close a section; closing one that is not open does nothing."""
        begin = self._open.pop(name, None)
        if begin is None:
            return
        end = self._mark()
        if isinstance(begin, float) and isinstance(end, float):
            self._seconds[name] += end - begin
        elif isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((name, begin, end))

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time the body of a with statement."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def drain(self) -> dict[str, float]:
        """Seconds per section since the last call; waits for the device once."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        result, self._seconds = dict(self._seconds), defaultdict(float)
        return result

    def _mark(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
