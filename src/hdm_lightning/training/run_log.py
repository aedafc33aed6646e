"""Messages of a run: on the screen, and with the time in the run's `train.log`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hdm_lightning.printable import printable
from hdm_lightning.whole_files import no_follow

NAME = "train.log"
_OPEN: list[Path] = []
"""The log of the run that this process works for, if it writes one."""


@contextmanager
def kept_in(run_dir: Path) -> Iterator[None]:
    """Append the messages inside the with statement to the run's log.

    An exception that leaves the statement is logged too.
    """
    _OPEN.append(run_dir / NAME)
    try:
        yield
    except BaseException as error:
        note(f"ended: {str(error) or type(error).__name__}")
        raise
    finally:
        _OPEN.clear()


def say(text: object) -> None:
    """Print and log one or more lines."""
    print(printable(text), flush=True)
    note(text)


def note(text: object) -> None:
    """Log one or more lines without printing them; a log that cannot be written does not stop the training."""
    if not _OPEN:
        return
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        with open(_OPEN[-1], "a", encoding="utf-8", opener=no_follow) as file:
            file.writelines(f"{now} {line}\n" for line in printable(text).splitlines())
    except OSError as error:
        print(f"{_OPEN.pop()} cannot be written ({error.strerror}): the run continues without it", flush=True)
