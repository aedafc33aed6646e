"""Memory that this process holds now and has held at most, on the host and on its device."""

import resource
import sys
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")
STATUS = Path("/proc/self/status")
GB = 1e9


def memory_gb(device: torch.device) -> dict[str, float]:
    """Figures in 10^9 bytes: `host` and `host_peak` resident; on CUDA also `device`, `device_peak` and `reserved`.

    `device` counts tensors, `reserved` what the allocator keeps for them.
    """
    figures = {"host": _resident_bytes() / GB, "host_peak": _peak_resident_bytes() / GB}
    if device.type == "cuda":
        figures["device"] = torch.cuda.memory_allocated(device) / GB
        figures["device_peak"] = torch.cuda.max_memory_allocated(device) / GB
        figures["reserved"] = torch.cuda.memory_reserved(device) / GB
    return figures


def _resident_bytes() -> int:
    """Resident now; the peak where the system does not tell."""
    if not STATM.exists():
        return _peak_resident_bytes()
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


def _peak_resident_bytes() -> int:
    if STATUS.exists():  # what getrusage says begins at the size of the process that started this one
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
