"""Keep freed host memory for the next step instead of giving it back to the kernel.

glibc maps every block above 128 KiB (later up to 32 MiB) anew and unmaps it when it is freed, so that a step on a CPU
spends a good part of its time in page faults. With high thresholds the heap is reused.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
MMAP_THRESHOLD_BYTES = 1 << 30
TRIM_THRESHOLD_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for this process; returns whether that was possible (Linux with glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    changed = [
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
    ]
    return all(changed)
