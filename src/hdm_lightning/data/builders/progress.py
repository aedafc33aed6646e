"""One line on the terminal that tells how far a long command is."""

import sys
import time
from typing import TextIO

EVERY_S = 0.5
EVERY_S_IN_A_FILE = 60.0


class ProgressLine:
    """Rewrites one line on a terminal; in a log file it adds a line a minute.

    Args:
        what: what is counted, in the plural.
        total: how many there are.
        stream: where to write.
    """

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self.what, self.total, self.stream = what, total, stream or sys.stderr
        self._begin = self._told = time.monotonic()

    def show(self, done: int, remark: str = "") -> None:
        """Tell how many are done, if it is time to."""
        now, live = time.monotonic(), self.stream.isatty()
        if done < self.total and now - self._told < (EVERY_S if live else EVERY_S_IN_A_FILE):
            return
        self._told = now
        left_s = (now - self._begin) / max(done, 1) * (self.total - done)
        text = f"{done} of {self.total} {self.what}, {left_s:.0f} s left{', ' + remark if remark else ''}"
        last = done >= self.total
        self.stream.write(f"\r\x1b[K{text}{chr(10) if last else ''}" if live else f"{text}\n")
        self.stream.flush()
