"""Process many items in parallel processes, in order, with a progress bar."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import resource_tracker
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from hdm_lightning.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Enough that no process waits for the slowest item, few enough that memory stays flat.
IN_FLIGHT_PER_PROCESS = 4
SAY_EVERY_S = 60.0


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, processes: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order; `processes` = 1 runs in this process.

    Args:
        function, items: the function must be importable by name, the items and results picklable.
        processes: number of worker processes; None for one per available core.

    Raises:
        UserError: a process was killed, as systems do when memory runs out.
    """
    workers = processes if processes is not None else available_cores()
    if workers <= 1:
        yield from map(function, items)
        return
    # Spawned, because forking a process with threads (such as torch's) can deadlock.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                with starting_quietly():
                    pending.append(pool.submit(interruptible, function, item))
                if len(pending) >= workers * IN_FLIGHT_PER_PROCESS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            hint = "free memory, or use fewer processes; the same command resumes, keeping what is done"
            raise UserError("a process was killed; was there enough memory?", hint=hint) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def starting_quietly() -> Iterator[None]:
    """Make processes that start meanwhile ignore Ctrl-C, which a terminal sends to all of them at once, except inside
    `interruptible`: otherwise each would print its own stack trace.
    """
    resource_tracker.ensure_running()  # if it started later, it would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _later():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _later() -> Iterator[None]:
    """Delay a Ctrl-C that another thread receives to the end: a half-started process would complain."""
    handler, came = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


_interrupted = False
"""Whether a process started within `starting_quietly` got a Ctrl-C, and so starts no more work."""


def interruptible(function: Callable[[Item], Result], item: Item) -> Result:
    """Return `function(item)`; Ctrl-C ends this call and all later ones in this process.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    global _interrupted
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if _interrupted:
            raise KeyboardInterrupt
        return function(item)
    except KeyboardInterrupt:
        _interrupted = True
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function to be called with the number of samples done; `total` None means unknown.

    Without a terminal for a bar, it prints a line every minute.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _every_minute(description, total)
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


def _every_minute(description: str, total: int | None) -> Callable[[int], None]:
    """Return a function that prints to stderr every minute how many are done, and the time left if it is known."""
    began: tuple[float, int] | None = None  # not 0: what an earlier call finished takes no time
    told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal began, told
        now = time.monotonic()
        first, before = began = began or (now, done)
        if now - told < SAY_EVERY_S or done == before:
            return
        told = now
        text = f"{description}: {done:,}"
        if total is not None:
            left = (now - first) / (done - before) * (total - done)
            text += f" of {total:,}, {timedelta(seconds=round(left))} to go"
        print(text, file=sys.stderr, flush=True)

    return tell
