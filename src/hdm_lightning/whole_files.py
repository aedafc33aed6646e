"""Files and folders that appear whole or not at all, readable as the umask says, and no links that are followed.

A folder may come from somebody else, so a name in it may be a link to any file of the user's.
"""

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from hdm_lightning.errors import UserError
from hdm_lightning.json_files import parse_object
from hdm_lightning.printable import in_one_line
from hdm_lightning.regular_files import open_regular, read_regular

TEMPORARY = ".tmp"
_NAME_BYTES = 100
"""Of a file's name in that of its replacement: some file systems allow 143 bytes in all."""


class Replacement:
    """A new file beside `path` that takes its place by `commit`.

    Args:
        path: file to make or replace; its folder is made if missing. A link of this name is replaced, not followed.

    Attributes:
        path: as given.
        temporary: the new file, empty at first; libraries that write by a name may also put another one there.

    Raises:
        UserError: `path` is a folder or a device.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise UserError("is no ordinary file, and will not be replaced", where=str(path), hint="name another file")
        self.path = path
        self.temporary = _temporary(path)
        handle = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._mode = stat.S_IMODE(os.fstat(handle).st_mode)  # what umask and folder make of 0666
        os.close(handle)

    def commit(self, *, new: bool = False) -> None:
        """Put the file in place once it is on the disk. Raises FileExistsError: it is to be `new`, and one is there."""
        handle = os.open(self.temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(handle, self._mode)  # safetensors puts one of mode 0600 there
            os.fsync(handle)
        finally:
            os.close(handle)
        if new:
            _put_beside(self.temporary, self.path)
        else:
            os.replace(self.temporary, self.path)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the file; what was there before stays."""
        self.temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yields the name of an empty file beside `path`, which takes its place at the end of the with statement.

    Raises:
        FileExistsError: the file is to be `new`, and another process has written one meanwhile.
        UserError: the disk is full, or `path` is no ordinary file. As with any exception, the old file is intact and
            the new one removed.
    """
    made: Replacement | None = None
    try:
        made = Replacement(path)
        yield made.temporary
        made.commit(new=new)
    except BaseException as error:
        if made is not None:
            made.discard()
        if is_disk_full(error):
            raise disk_full_error(path) from error
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which gets that name at the end of the with statement.

    Raises:
        OSError: no folder can be made there, or one with files in it was made meanwhile.
        UserError: as inside the with statement, with the final name in its text. As with any exception, nothing stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    except UserError as error:
        texts = [text and text.replace(str(temporary), str(path)) for text in (error.what, error.where, error.hint)]
        raise UserError(str(texts[0]), where=texts[1], hint=texts[2]) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    """A name beside that of a file or folder, which no other has."""
    begin = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES]).encode(errors="ignore").decode()
    return path.with_name(f".{begin}.{secrets.token_hex(8)}{TEMPORARY}")


def _put_beside(temporary: Path, path: Path) -> None:
    """Give a file its name unless another has it, also of two processes that do so at once."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # the file system knows no links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any], *, new: bool = False) -> None:
    """Let `write(file)` fill a new file, then put it in place of `path`; see `replacing`."""
    with replacing(path, new=new) as temporary, temporary.open("wb") as file:
        write(file)


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a text as UTF-8; see `replacing`."""
    content = text.encode("utf-8", errors)
    write_atomically(path, lambda file: file.write(content))


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON; see `replacing`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder that the user has named, and those above it.

    Raises:
        UserError: there can be none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(folder) from error
        raise _leads_nowhere(error) or UserError(
            f"no folder can be made here ({error.strerror})",
            where=str(folder),
            hint="name another place, or move away what is there",
        ) from error


def move_in(source: Path, folder: Path, *, last: str) -> None:
    """Put every file below `source` at the same place below `folder`, each as by `replacing`.

    Args:
        source: a folder on the same file system.
        folder: where to; the subfolders are made.
        last: path below `source` of the file that is moved when all others are there.
    """
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file == source / last):
        with replacing(folder / file.relative_to(source)) as temporary:
            os.replace(file, temporary)


def no_follow(path: str, flags: int) -> int:
    """An opener for `open` that refuses a symbolic link (OSError ELOOP) and makes files as the umask says.

    A pipe or a device that somebody put there is refused (OSError ENXIO) instead of waited for.
    """
    handle = open_regular(path, flags | os.O_NOFOLLOW)
    os.set_blocking(handle, True)
    return handle


def is_link_error(error: OSError) -> bool:
    """Whether `no_follow` has met a symbolic link."""
    return error.errno == errno.ELOOP


def link_error(path: Path | str) -> UserError:
    """The error for a symbolic link in the place of a file that is to be written."""
    return UserError(
        "is a symbolic link, which could lead to any of your files, so nothing is written to it",
        where=str(path),
        hint="delete the link, and look where the folder comes from",
    )


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder`."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def disk_full_error(path: Path | str) -> UserError:
    """The error when `path` could not be written because the disk, a quota or a size limit is reached."""
    return UserError(
        "the disk is full; what was there before is intact",
        where=str(path),
        hint="free space, or write to another disk (run_dir= of a training, --out of most others), then run the same "
        "command again",
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that a disk, a quota or a limit of file sizes is reached."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    if type(error).__name__ == "SafetensorError":  # states the number in its text alone
        return any(f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    # torch's zip writer reports a short write as a RuntimeError about the stream's position.
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "unexpected pos" in str(error))


_OF_THE_USER = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or name another place"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "move what is there away, or name another place"),
    **dict.fromkeys((errno.ENXIO, errno.EBUSY, errno.ENOTEMPTY), "move what is there away, or name another place"),
    errno.EINVAL: "name another place",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files: ulimit -n 4096"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "name another place"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "look at the disk or the network's file system"),
}
"""What helps where the file system refuses something, by its number."""


def file_error(error: BaseException) -> UserError | None:
    """What to tell the user where an exception is the file system's refusal of a place, None for all others."""
    path = getattr(error, "filename", None)
    if is_disk_full(error):
        return disk_full_error(os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "output")
    if not isinstance(error, OSError) or not isinstance(path, str | bytes | os.PathLike):
        return None
    if isinstance(error, FileExistsError) and (nowhere := _leads_nowhere(error)) is not None:
        return nowhere
    hint = _OF_THE_USER.get(error.errno or 0)
    what = f"cannot be read or written ({error.strerror})"
    return None if hint is None else UserError(what, where=os.fsdecode(path), hint=hint)


def _leads_nowhere(error: OSError) -> UserError | None:
    """What to say where a folder is a link to one that is not there; the system says that the link exists."""
    path = str(error.filename)
    if not os.path.islink(path) or os.path.exists(path):
        return None
    what = f"is a link to {in_one_line(os.path.realpath(path))}, which is not there"
    return UserError(what, where=path, hint="mount the disk that it leads to, or name another place")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Write one line and sync it; what a crash cut short before it stays a line of its own.

    Raises:
        UserError: when the disk is full, or the file is a symbolic link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "a+b", opener=no_follow) as file:
            if file.tell() and not _ends_a_line(path):
                file.write(b"\n")
            file.write(json.dumps(values).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(path) from error
        if is_link_error(error):
            raise link_error(path) from error
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a file that are whole objects, none where there is no file.

    Raises:
        UserError: it is there and cannot be read.
    """
    if not path.exists():
        return []
    try:
        content = read_regular(path)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise UserError(what, where=str(path), hint="look at what has its name, and at its permissions") from error
    lines = []
    for line in content.splitlines():
        with suppress(ValueError):  # the line a crash cut short, or zeros that a power cut left
            lines.append(parse_object(line))
    return lines


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb", opener=open_regular) as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
