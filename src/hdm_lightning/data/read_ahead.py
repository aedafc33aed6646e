"""Threads that read while samples are prepared, and that nobody has to wait for at the end."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class ReadAhead:
    """Runs calls in a few daemon threads, which start with the first call.

    Unlike those of `ThreadPoolExecutor`, they do not hold up the end of the process while a server is silent.

    Args:
        threads: how many calls run side by side.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] | None = None

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """The result to come of a call."""
        if self._calls is None:
            self._calls = SimpleQueue()
            for _ in range(self._threads):
                threading.Thread(target=_work, args=(self._calls,), name="read-ahead", daemon=True).start()
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future


def _work(calls: "SimpleQueue[tuple[Future[Any], Callable[[], Any]]]") -> None:
    while True:
        future, call = calls.get()
        try:
            future.set_result(call())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)
