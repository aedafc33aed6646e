"""Work over many items: in several processes, in the items' order, with a progress bar."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from hdm_lightning.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Enough that no process waits for the slowest item, few enough that memory stays flat.
IN_FLIGHT_PER_PROCESS = 4


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, processes: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order; with one process, without starting any.

    Args:
        function, items: the function must be importable by name, the items and results picklable.
        processes: workers; None means as many as this process may use cores.

    Raises:
        UserError: a process was ended from outside, as systems do where memory is out.
    """
    workers = processes if processes is not None else available_cores()
    if workers <= 1:
        yield from map(function, items)
        return
    # Spawned, because forking a process that holds threads (torch, say) can deadlock.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= workers * IN_FLIGHT_PER_PROCESS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            hint = "free memory, or take fewer processes; what is done stays, and the same command goes on"
            raise UserError("a process was killed; was there enough memory?", hint=hint) from error


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function to be called with the number of samples done; `total` None means unknown."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)
