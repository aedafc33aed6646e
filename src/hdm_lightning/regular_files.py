"""Open untrusted paths only if they are regular files: pipes block forever, and devices never end."""

import errno
import os
import stat
from pathlib import Path


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Return the descriptor of a local file; also an opener for `open`. Raises OSError: not a readable file."""
    handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a pipe without a writer would block
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise OSError(errno.ENXIO, "not a regular file", path)
    return handle


def read_regular(path: Path, most: int | None = None) -> bytes:
    """Return the content of a file.

    Args:
        path: the file.
        most: largest allowed size in bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger.
    """
    with open(path, "rb", opener=open_regular) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
        return file.read()
