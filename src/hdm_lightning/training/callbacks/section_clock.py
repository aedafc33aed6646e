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
        self.waiting_since: float | None = None

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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the with statement no section counts; those that were open before stay so."""
        kept = self._seconds, self._events, self._open
        self._seconds, self._events, self._open = defaultdict(float), [], {}
        try:
            yield
        finally:
            self._seconds, self._events, self._open = kept

    def add(self, name: str, seconds: float) -> None:
        """Add seconds measured elsewhere."""
        self._seconds[name] += seconds

    def begin_wait(self) -> None:
        """All that belongs to a batch is done; what comes now is waiting for the next one."""
        self.waiting_since = time.perf_counter()

    def end_wait(self) -> None:
        """The batch is here: the time since `begin_wait` counts as the section "data"."""
        if self.waiting_since is not None:
            self.add("data", time.perf_counter() - self.waiting_since)

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
