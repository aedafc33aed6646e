"""Files that others may have put there, opened only where they are files: pipes wait for ever, devices never end."""

import errno
import os
import stat
from pathlib import Path


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a local file; an opener for `open`, too. Raises OSError: it cannot be read, or is none."""
    handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a pipe without a writer would hold us up
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise OSError(errno.ENXIO, "not a regular file", path)
    return handle


def read_regular(path: Path, most: int | None = None) -> bytes:
    """What is in a file.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be read, is no file, or has more bytes.
    """
    with open(path, "rb", opener=open_regular) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
        return file.read()
