"""This machine and its rates: devices, matrix products, memory, disk, links between GPUs."""

import os
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from hdm_lightning import one_machine
from hdm_lightning.errors import UserError
from hdm_lightning.precision import dtype_name, half_dtype
from hdm_lightning.profiling.bench_settings import SystemSettings
from hdm_lightning.profiling.gpus import CPU, Gpu, Machine, find_gpu
from hdm_lightning.profiling.timing import Timing, measurement, time_call
from hdm_lightning.version import __version__

CPU_MATMUL = 1536
"""Side of the matrices whose product measures a CPU's compute rate."""
CPU_COPY_MIB = 256
"""Size of the copy that measures its memory bandwidth, 2^20 bytes."""

_MIB = 2**20


def chosen_device(name: str) -> torch.device:
    """Return a device by name; ``auto``: the first GPU, else the CPU. Raises UserError: it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:(0|[1-9][0-9]{0,2}))?", name):  # torch knows more, on which nothing here runs
        raise UserError(f"{name!r} is not a device to run on", where="--device", hint="use auto, cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"{name!r} is not available; CUDA devices: {count}", where="--device", hint="use another, or cpu"
        )
    return device


def machine_at_hand() -> Machine:
    """Return this machine: its GPUs from the table with their actual memory, or the CPU with measured rates (seconds).

    Raises:
        UserError: the GPU is not in the table.
    """
    if not torch.cuda.is_available():
        device, memory = torch.device("cpu"), physical_memory_bytes() / 2**30
        _, rate = matmul(device, torch.float32, CPU_MATMUL, repeats=5)
        _, bandwidth = memory_bandwidth(device, mib=CPU_COPY_MIB, repeats=5)
        cpu = Gpu(CPU, rate / 1e12, memory, bandwidth / 1e9, link_gb_s=10.0, power_w=0.0, usd_per_hour=0.0)
        return Machine(cpu, 1)
    properties = torch.cuda.get_device_properties(0)
    gpu = find_gpu(properties.name)
    if gpu is None:
        raise UserError(
            f"this machine's GPU, {properties.name}, is not in the table",
            where="gpus",
            hint="use the nearest one, e.g. gpus=1x5090, and override its figures with gpu.peak_tflops=… …",
        )
    return Machine(replace(gpu, memory_gib=properties.total_memory / 2**30), torch.cuda.device_count())


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return processor, memory, GPUs and versions of this machine; `device` is the one to benchmark."""
    described: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(physical_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hdm_lightning": __version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return described


def cpu_name() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def physical_memory_bytes() -> int:
    """Return the machine's main memory; 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def matmul(device: torch.device, dtype: torch.dtype, size: int, *, repeats: int = 10) -> tuple[Timing, float]:
    """Time a size × size matrix product; return the timing and the median operations per second."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    timing = time_call(lambda: torch.mm(left, right, out=out), device, warmup=3, repeats=repeats)
    return timing, 2 * size**3 / timing.median


def memory_bandwidth(device: torch.device, *, mib: int = 512, repeats: int = 10) -> tuple[Timing, float]:
    """Time a copy of 2^20·mib bytes within a device; return the timing and bytes read plus written per second."""
    source = torch.ones(mib * _MIB // 4, device=device)
    target = torch.empty_like(source)
    timing = time_call(lambda: target.copy_(source), device, warmup=2, repeats=repeats)
    return timing, 2 * mib * _MIB / timing.median


def disk(folder: Path, *, mib: int = 512, repeats: int = 3) -> dict[str, tuple[Timing, float]]:
    """Time writing and reading a file of 2^20·mib random bytes, flushed to disk and dropped from the page cache.

    Returns ``write`` and ``read``, each with bytes per second. The file is in a temporary folder.
    """
    block = os.urandom(16 * _MIB)
    blocks = max(1, mib // 16)
    with tempfile.TemporaryDirectory(dir=folder, prefix="hdm-bench-") as inside:
        file = Path(inside) / "block"
        cpu = torch.device("cpu")
        write = time_call(lambda: _write(file, block, blocks), cpu, warmup=0, repeats=repeats)
        read_seconds: list[float] = []
        for _ in range(repeats):
            _forget(file)
            read_seconds += time_call(lambda: _read(file), cpu, warmup=0, repeats=1).seconds
    read, size = Timing(tuple(read_seconds)), blocks * len(block)
    return {"write": (write, size / write.median), "read": (read, size / read.median)}


def device_to_device(*, mib: int = 256, repeats: int = 10) -> tuple[Timing, float] | None:
    """Time a copy from the first GPU to the second; return the timing and bytes per second; None without two."""
    if torch.cuda.device_count() < 2:
        return None
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    source = torch.ones(mib * _MIB // 4, device=first)
    target = torch.empty_like(source, device=second)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(first)

    timing = time_call(copy, second, warmup=3, repeats=repeats)
    return timing, mib * _MIB / timing.median


def all_reduce(processes: int, *, mib: int = 256, repeats: int = 10) -> tuple[Timing, float]:
    """Time an all-reduce over processes, one per GPU (NCCL), or on the CPU if there are fewer GPUs (gloo).

    Args:
        processes: number of processes, at least 2; else ValueError.
        mib: size of each process's tensor, 2^20 bytes.
        repeats: timed sums.

    Returns:
        The timing of the first process, and the bus bandwidth 2·(n − 1)/n · bytes / seconds, comparable to a link's.
    """
    if processes < 2:
        raise ValueError(f"processes: got {processes}, expected at least 2")
    with one_machine.meeting_place() as folder:
        meeting, result = folder / "meeting", folder / "seconds"
        spawn(_sum_worker, (processes, str(meeting), str(result), mib, repeats), nprocs=processes)
        seconds = tuple(float(line) for line in result.read_text().split())
    timing = Timing(seconds)
    return timing, 2 * (processes - 1) / processes * mib * _MIB / timing.median


def _sum_worker(rank: int, processes: int, meeting: str, result: str, mib: int, repeats: int) -> None:
    on_gpus = torch.cuda.device_count() >= processes
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    one_machine.will_meet_at(meeting)
    one_machine.join("nccl" if on_gpus else "gloo", rank, processes)
    try:
        tensor = torch.ones(mib * _MIB // 4, device=device)
        timing = time_call(lambda: dist.all_reduce(tensor), device, warmup=3, repeats=repeats)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if rank == 0:
        Path(result).write_text("\n".join(map(repr, timing.seconds)))


def _write(file: Path, block: bytes, blocks: int) -> None:
    with file.open("wb", buffering=0) as out:
        for _ in range(blocks):
            out.write(block)
        os.fsync(out.fileno())


def _read(file: Path) -> None:
    with file.open("rb", buffering=0) as source:
        while source.read(4 * _MIB):
            pass


def _forget(file: Path) -> None:
    """Ask the system to drop the file from its cache, if supported."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine_rates(settings: SystemSettings, device: torch.device, side: int, mib: int) -> Iterator[dict[str, Any]]:
    """Yield rows of measured rates: products of side × side matrices, copies of 2^20·mib bytes, disk, links."""
    for dtype in (torch.float32, half_dtype(device) if device.type == "cuda" else torch.bfloat16):
        timing, rate = matmul(device, dtype, side, repeats=settings.repeats)
        yield measurement(f"matmul {dtype_name(dtype)}", timing, flops=2.0 * side**3, tflop_per_s=rate / 1e12)
    timing, rate = memory_bandwidth(device, mib=mib, repeats=settings.repeats)
    yield measurement("memory copy", timing, gb_per_s=rate / 1e9)
    for name, (timing, rate) in disk(settings.disk, mib=mib, repeats=min(3, settings.repeats)).items():
        yield measurement(f"disk {name}", timing, mb_per_s=rate / 1e6)
    between = device_to_device(mib=mib, repeats=settings.repeats)
    if between is not None:
        yield measurement("GPU to GPU", between[0], gb_per_s=between[1] / 1e9)
    processes = settings.processes or torch.cuda.device_count()
    if processes >= 2:
        timing, rate = all_reduce(processes, mib=mib, repeats=settings.repeats)
        yield measurement("all-reduce", timing, bus_gb_per_s=rate / 1e9, processes=processes)
