"""Where a command's results go, checked before the work that makes them and not after it."""

import os
from collections.abc import Sequence
from pathlib import Path

from hdm_lightning.errors import UserError


def require_folder(folder: Path, where: str) -> Path:
    """The folder, which is there or can be made.

    Args:
        folder: to write into.
        where: the option or key to name in errors.

    Raises:
        UserError: something else has its name, or it cannot be written to.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{folder} is no folder that can be written to", where=where, hint="name another place")
    return folder


def require_file(file: Path, where: str) -> Path:
    """The file, which can be written or replaced.

    Raises:
        UserError: it is a folder, or its folder cannot be written to.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder", where=where, hint=f"give a file, such as {file / 'result.json'}")
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
