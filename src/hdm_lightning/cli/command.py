"""Shared by all commands: exit status, progress bars, output paths and argparse types."""

import gc
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.errors import UserError, memory_error
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import file_error, write_json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

TRACEBACK_VARIABLE = "HDM_TRACEBACK"
USER_ERROR_STATUS = 2
LESS = "use smaller batches or images or fewer processes, or a machine with more memory"
INTERRUPTED_STATUS = 130


def run_command(function: Callable[[], int | None]) -> int:
    """Run a command's body and turn its outcome into an exit status.

    Returns:
        The body's status, 0 for None; 2 for a `UserError`, a file that cannot be accessed or a lack of memory, printed
        to stderr without a stack trace unless HDM_TRACEBACK=1 is set; 130 for a keyboard interrupt; 0 if the reader of
        the output closes the pipe, as in `| head`. Any other exception is a bug and propagates.
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
    """Pause the garbage collector during imports: scanning modules takes a tenth of the startup time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def reader_is_gone() -> bool:
    """Return whether the reader of stdout has closed the pipe; if so, redirect further output to devnull."""
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
        poll.register(output, 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a real file
        return False
    if gone:  # so that the flush at interpreter exit does not meet a closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


@cache
def require_platform(name: str) -> None:
    """Reject Windows, whose locks, signals and processes differ, and warn about other untested systems.

    Raises:
        UserError: the system is Windows.
    """
    if name in ("win32", "cygwin"):
        what = "Windows lacks the file locks, signals and process forking that hdm-lightning needs"
        raise UserError(what, where="system", hint="install WSL2 (`wsl --install`) and run the command inside it")
    if not name.startswith("linux"):
        print(f"note: hdm-lightning is tested on Linux only, not on {name}; it uses only the CPU", file=sys.stderr)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress bars on stderr, one per task; yields a function that takes (task name, number done, total)."""
    from rich.console import Console  # noqa: PLC0415  (keeps --help fast)
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
        if tasks:  # else an empty line would precede the message of an early error
            bar.stop()


def table_console(width: int = 120) -> "Console":
    """Return a console as wide as the terminal, or `width` columns if the output is not a terminal."""
    from rich.console import Console  # noqa: PLC0415  (keeps --help fast)

    return Console(width=None if sys.stdout.isatty() else width)


def show_report(
    report: "RenderableType", content: dict[str, Any], out: Path | None, *, below: Iterable[str] = ()
) -> None:
    """Print a report and the lines `below` it, and write its JSON to `out`."""
    table_console().print(report)
    for line in below:  # not by rich, which would wrap it and take [brackets] for markup
        print(in_one_line(line))
    if out is not None:
        write_json(out, content)
        print(in_one_line(f"written to {out}"))


def require_folder(folder: Path, where: str) -> Path:
    """Return the folder after checking that it can be created or written to.

    Raises:
        UserError: it is not a folder, or it is not writable; names the option or key `where`.
    """
    import tempfile  # noqa: PLC0415 (keeps --help fast)

    there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    try:
        with tempfile.TemporaryFile(dir=there):
            return folder
    except OSError as error:
        what = f"{folder} is not a writable folder ({there}: {error.strerror})"
        raise UserError(what, where=where, hint="choose another path") from error


def require_file(file: Path, where: str) -> Path:
    """Return the file after checking that it can be written or replaced.

    Raises:
        UserError: it is a folder, a device or a pipe, or its folder is not writable.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder", where=where, hint=f"use a file name, such as {file / 'result.json'}")
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is a device or a pipe and cannot be replaced", where=where, hint="use a file name")
    require_folder(file.parent, where)
    return file


def require_picture(file: Path, where: str, *, more: Sequence[str] = ()) -> Path:
    """Return the file after checking that it can be written and has an image suffix or one of `more`.

    Raises:
        UserError: it has another suffix, or cannot be written.
    """
    endings = (".png", ".jpg", ".jpeg", ".webp", *more)
    if file.suffix.lower() not in endings:
        raise UserError(f"{file} does not end in {', '.join(endings)}", where=where, hint=f"name it {file.stem}.png")
    return require_file(file, where)
