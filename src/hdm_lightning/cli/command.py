"""What all commands share: how they end, where their results go, numbers that must not be too small."""

import argparse
import gc
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.errors import UserError, memory_error
from hdm_lightning.whole_files import file_error, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

TRACEBACK_VARIABLE = "HDM_TRACEBACK"
USER_ERROR_STATUS = 2
LESS = "take less at once, such as smaller batches or images or fewer processes, or a machine that has more"
INTERRUPTED_STATUS = 130


def run_command(function: Callable[[], int | None]) -> int:
    """Run a command's body and turn how it ends into an exit status.

    Args:
        function: the body; returns an exit status, or None for 0.

    Returns:
        The body's status; 2 for a `UserError` and where the file system refuses a place, printed to stderr without a
        stack trace unless the environment has HDM_TRACEBACK=1; 130 when interrupted from the keyboard; 0 where
        whatever read the output has seen enough, as in `| head`. Any other exception is a defect and passes.
    """
    try:
        require_platform(sys.platform)
        status = function() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    except Exception as error:
        told = error if isinstance(error, UserError) else file_error(error) or memory_error(error, hint=LESS)
        if told is None or os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        print(f"error: {told}", file=sys.stderr)
        return USER_ERROR_STATUS


@contextmanager
def collection_paused() -> Iterator[None]:
    """Import without the garbage collector: modules are no garbage, and looking through them is a tenth of a start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def reader_is_gone() -> bool:
    """Whether nobody reads the standard output any more; what is still to be written then goes nowhere."""
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
        poll.register(output, 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # no real file
        return False
    if gone:  # so that the last flush, at the interpreter's end, finds no closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


@cache
def require_platform(name: str) -> None:
    """Refuse a system whose locks, signals and processes are other than Linux's, and warn of one that was not tried.

    Args:
        name: `sys.platform`.

    Raises:
        UserError: it is Windows.
    """
    if name in ("win32", "cygwin"):
        what = "Windows lacks the file locks, signals and forked processes that hdm-lightning needs"
        raise UserError(what, where="system", hint="install WSL2 (`wsl --install`) and run the command inside it")
    if not name.startswith("linux"):
        print(f"note: hdm-lightning is tested on Linux only, not on {name}; it uses the CPU alone", file=sys.stderr)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr, one for each thing that is being done; yields what takes (thing, how many are done, of all)."""
    from rich.console import Console  # noqa: PLC0415  (for --help's sake)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            bar.start()
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:  # else it would end with an empty line, above the message of what could not begin
            bar.stop()


def show_report(report: "RenderableType", content: dict[str, Any], out: Path | None) -> None:
    """Print a report, wide enough for a schedule of four stages where the output is no terminal, and write its JSON."""
    from rich.console import Console  # noqa: PLC0415  (for --help's sake)

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(report)
    if out is not None:
        write_json(out, content)
        console.print(f"written to {out}")


def require_folder(folder: Path, where: str) -> Path:
    """The folder, which is there or can be made.

    Args:
        folder: to write into.
        where: the option or key to name in errors.

    Raises:
        UserError: something else has its name, or it cannot be written to.
    """
    import tempfile  # noqa: PLC0415 (for --help's sake)

    there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    try:
        with tempfile.TemporaryFile(dir=there):
            return folder
    except OSError as error:
        what = f"{folder} is no folder that can be written to ({there}: {error.strerror})"
        raise UserError(what, where=where, hint="name another place") from error


def require_file(file: Path, where: str) -> Path:
    """The file, which can be written or replaced.

    Raises:
        UserError: it is a folder, a device or a pipe, or its folder cannot be written to.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder", where=where, hint=f"give a file, such as {file / 'result.json'}")
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is a device or a pipe, and would not be replaced", where=where, hint="name a file")
    require_folder(file.parent, where)
    return file


def require_picture(file: Path, where: str, *, more: Sequence[str] = ()) -> Path:
    """The file, which can be written and whose name ends like a picture's.

    Args:
        file: to write.
        where: the option or key to name in errors.
        more: endings that this command can write, too.

    Raises:
        UserError: it ends otherwise, or cannot be written.
    """
    endings = (".png", ".jpg", ".jpeg", ".webp", *more)
    if file.suffix.lower() not in endings:
        raise UserError(f"{file} does not end in {', '.join(endings)}", where=where, hint=f"name it {file.stem}.png")
    return require_file(file, where)


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, refused with a message where it is smaller."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is less than {least}")
        return number

    return whole_number


def named_number(text: str) -> tuple[str, float]:
    """An argparse type: NAME=NUMBER."""
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = nan
    if not (equals and name) or isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=NUMBER")
    return name, value
