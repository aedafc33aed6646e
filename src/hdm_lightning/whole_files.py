"""Write files and folders atomically, with permissions from the umask, and never through a symbolic link.

A folder may come from somebody else, so a name in it may link to any of the user's files.
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
"""Bytes of a file's name kept in the name of its replacement: some file systems allow only 143 in all."""


@contextmanager
def replacing(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield the name of an empty file beside `path` that takes its place at the end of the with statement.

    The folder of `path` is created if missing. A link at `path` is replaced, not followed. Libraries that write by name
    may replace the empty file with their own.

    Raises:
        FileExistsError: the file must be `new`, but another process has written one in the meantime.
        UserError: the disk is full, or `path` is a folder or a device. After any exception the old file is intact and
            the new one removed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise UserError("is not a regular file and will not be replaced", where=str(path), hint="name another file")
        temporary = _temporary(path)
        temporary.touch(exist_ok=False)
        try:
            mode = stat.S_IMODE(temporary.stat().st_mode)  # 0666 after umask and folder defaults
            yield temporary
            _put_in_place(temporary, path, mode, new=new)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:
        if is_disk_full(error):
            raise disk_full_error(path) from error
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path`, which is renamed to `path` at the end of the with statement.

    After any exception nothing is left of it.

    Raises:
        OSError: the folder cannot be created, or one with files in it has been created at `path` meanwhile.
        UserError: raised inside the with statement; its text names the final folder.
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
    """Return an unused name next to a file or folder."""
    begin = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES]).encode(errors="ignore").decode()
    return path.with_name(f".{begin}.{secrets.token_hex(8)}{TEMPORARY}")


def _put_in_place(temporary: Path, path: Path, mode: int, *, new: bool) -> None:
    """Sync a file and move it to `path`. Raises FileExistsError: it must be `new`, and `path` exists."""
    handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(handle, mode)  # safetensors replaces it with one of mode 0600
        os.fsync(handle)
    finally:
        os.close(handle)
    if not new or not _linked(temporary, path):
        os.replace(temporary, path)
    _sync_folder(path.parent)


def _linked(temporary: Path, path: Path) -> bool:
    """Give a file a second name unless it is taken, even if two processes do so at once; False if there are no links.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        return False
    return True


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any], *, new: bool = False) -> None:
    """Let `write(file)` fill a new file, then move it to `path`; see `replacing`."""
    with replacing(path, new=new) as temporary, temporary.open("wb") as file:
        write(file)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; see `replacing`."""
    write_atomically(path, lambda file: file.write(content))


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write text as UTF-8; see `replacing`."""
    write_bytes(path, text.encode("utf-8", errors))


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON; see `replacing`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_folder(folder: Path) -> None:
    """Create a folder named by the user, and its parents.

    Raises:
        UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(folder) from error
        raise _leads_nowhere(error) or UserError(
            f"no folder can be created here ({error.strerror})",
            where=str(folder),
            hint="choose another place, or move away what is there",
        ) from error


def move_in(source: Path, folder: Path, *, last: str) -> None:
    """Move every file below `source` to the same path below `folder`, each as in `replacing`.

    Args:
        source: a folder on the same file system.
        folder: destination; subfolders are created.
        last: path below `source` of the file to move after all others.
    """
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file == source / last):
        with replacing(folder / file.relative_to(source)) as temporary:
            os.replace(file, temporary)


def no_follow(path: str, flags: int) -> int:
    """An opener for `open` that refuses a symbolic link (OSError ELOOP) and creates files with the umask's mode.

    A pipe or a device in its place is refused (OSError ENXIO) instead of blocking.
    """
    handle = open_regular(path, flags | os.O_NOFOLLOW)
    os.set_blocking(handle, True)
    return handle


def is_link_error(error: OSError) -> bool:
    """Return whether `no_follow` has refused a symbolic link."""
    return error.errno == errno.ELOOP


def link_error(path: Path | str) -> UserError:
    """Return the error for a symbolic link in place of a file to write."""
    return UserError(
        "is a symbolic link, which could lead to any of your files, so nothing is written to it",
        where=str(path),
        hint="delete the link, and check where the folder comes from",
    )


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder`."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def disk_full_error(path: Path | str) -> UserError:
    """Return the error for a `path` not written because the disk is full, or a quota or size limit is reached."""
    return UserError(
        "the disk is full; what was there before is intact",
        where=str(path),
        hint="free space, or write to another disk (run_dir= for training, --out for most others), then run the same "
        "command again",
    )


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception means that a disk is full, or a quota or file size limit is reached."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    if type(error).__name__ == "SafetensorError":  # has the number only in its text
        return any(f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    # torch's zip writer reports a short write as a RuntimeError about the stream's position.
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "unexpected pos" in str(error))


_OF_THE_USER = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or choose another place"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "move what is there away, or choose another place"),
    **dict.fromkeys((errno.ENXIO, errno.EBUSY, errno.ENOTEMPTY), "move what is there away, or choose another place"),
    errno.EINVAL: "choose another place",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files: ulimit -n 4096"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "choose another place"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk or the network file system"),
}
"""Hint for each errno with which the file system refuses something that the user can change."""


def file_error(error: BaseException) -> UserError | None:
    """Return the error to show when the file system has refused a path, or None for any other exception."""
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
    """Return the error for a broken link in place of a folder, where the system only reports that it exists."""
    path = str(error.filename)
    if not os.path.islink(path) or os.path.exists(path):
        return None
    what = f"is a link to {in_one_line(os.path.realpath(path))}, which does not exist"
    return UserError(what, where=path, hint="mount the disk that it points to, or choose another place")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON line and sync it; a line cut short by a crash before it stays separate.

    Raises:
        UserError: the disk is full, or the file is a symbolic link.
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
    """Return all lines of a file that are complete objects; empty if there is no file.

    Raises:
        UserError: the file exists but cannot be read.
    """
    if not path.exists():
        return []
    try:
        content = read_regular(path)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise UserError(what, where=str(path), hint="check what is at this path, and its permissions") from error
    lines = []
    for line in content.splitlines():
        with suppress(ValueError):  # a line cut short by a crash, or zeros left by a power cut
            lines.append(parse_object(line))
    return lines


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb", opener=open_regular) as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
