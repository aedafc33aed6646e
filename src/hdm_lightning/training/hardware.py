"""Devices, precision and strategy: what `auto` means on this machine; host memory and messages of libraries."""

import ctypes
import logging
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from hdm_lightning.errors import UserError
from hdm_lightning.precision import half_dtype
from hdm_lightning.training.composition import plain
from hdm_lightning.training.strategies import float8
from hdm_lightning.version import __version__

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
MMAP_THRESHOLD_BYTES = 1 << 30
TRIM_THRESHOLD_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Keep freed host memory for the next step; return whether that is possible (Linux with glibc).

    glibc maps every block above 128 KiB (later up to 32 MiB) afresh and unmaps it when it is freed, so a step on a CPU
    spends much of its time in page faults. With high thresholds the heap is reused.
    """
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


LOGGERS = ("lightning.pytorch", "lightning.fabric", "torch.distributed.launcher.api", "torch.distributed.elastic")


def quiet_libraries() -> None:
    """Silence chatty loggers and warnings that a user of a command cannot act on."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("lightning", "torch"):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


FLOAT16 = "16-mixed"
PRECISIONS = ("32-true", "bf16-mixed", FLOAT16)
SHARDED = "fsdp2"
STRATEGIES = ("auto", "ddp", SHARDED)
OWN_STRATEGIES = ("auto", "ddp", "ddp_static_graph")
"""Strategies that get the runner's DDP settings."""
OVERLAP = "hardware.overlap_encoders"


def accelerator(name: Any) -> str:
    """Return `cpu` or `cuda` for a value of `trainer.accelerator`; `gpu` is Lightning's word for the latter.

    Raises:
        UserError: the name is unknown, or it is cuda and there is no CUDA device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "gpu"):
        raise UserError(f"'{name}' is not one of auto, cpu, cuda", where="trainer.accelerator", hint="use trainer=auto")
    if name != "cpu" and not torch.cuda.is_available():
        raise _no_cuda()
    return "cpu" if name == "cpu" else "cuda"


def _no_cuda() -> UserError:
    what, hint = "no CUDA device is visible", "check whether nvidia-smi lists the card"
    if torch.version.hip is not None:
        what, hint = "no ROCm device is visible", "check whether rocminfo lists the card"
    elif torch.version.cuda is None:
        what, hint = "this build of torch lacks CUDA", "install a CUDA build, see pytorch.org for your driver"
    hint += "; without a card, use trainer=cpu and a preset for it such as experiment=openclipart_cpu"
    return UserError(what, where="trainer.accelerator", hint=hint)


def local_devices(devices: Any, kind: str) -> int:
    """Return the number of processes on this machine, one per device, for a value of `trainer.devices`.

    Raises:
        UserError: there are not that many devices.
    """
    where = "trainer.devices"
    if not isinstance(devices, bool) and devices in ("auto", None, 0, -1):
        devices = 0
    if isinstance(devices, bool) or not isinstance(devices, int):
        raise UserError(f"{devices!r} is not a number of devices", where=where, hint="set a number, or auto for all")
    if devices < 0:
        raise UserError(f"{devices} is negative", where=where, hint="use auto for all devices")
    if kind == "cpu":
        return max(1, devices)
    present = torch.cuda.device_count()
    if devices > present:
        raise UserError(f"{devices} devices requested, {present} present", where=where, hint="use auto for all")
    return devices or present


def precision(name: str, kind: str) -> Any:
    """Return Lightning's name for a value of `trainer.precision`.

    Raises:
        UserError: the precision does not train well, or the device does not support it.
    """
    if name in ("auto", None):
        if kind == "cpu":
            return "32-true"
        return "bf16-mixed" if half_dtype() == torch.bfloat16 else FLOAT16
    if name not in PRECISIONS:
        raise UserError(
            f"'{name}' is not one of auto, {', '.join(PRECISIONS)}: weights kept in half precision lose small updates",
            where="trainer.precision",
            hint="set trainer.precision=auto",
        )
    if name == FLOAT16 and kind == "cpu":
        raise UserError(
            "a CPU cannot train in float16", where="trainer.precision", hint="use 32-true, bf16-mixed or auto"
        )
    return name


def resolve(config: DictConfig) -> None:
    """Replace `auto` in `trainer` with the accelerator and precision of this machine.

    Raises:
        UserError: naming the key whose value is not available.
    """
    trainer = config["trainer"]
    kind = accelerator(plain(config, "trainer.accelerator"))
    trainer["accelerator"] = kind
    trainer["precision"] = precision(plain(config, "trainer.precision"), kind)


def check_combination(config: DictConfig, *, of_vae: bool) -> None:
    """Refuse a sharded network, FP8 matrices or overlapped encoders where they do not work.

    Args:
        config: the configuration, with `auto` resolved.
        of_vae: whether an autoencoder is trained.

    Raises:
        UserError: naming the key, and the strategy or the precision with which it does not work.
    """
    sharded, in_float8 = plain(config, "trainer.strategy") == SHARDED, plain(config, float8.WHERE)
    if of_vae:
        whole = "an autoencoder is small and is trained whole on every device: fsdp2 is for hdm-train"
        overlapped = plain(config, OVERLAP)
        for key, wanted, what, hint in (
            ("trainer.strategy", sharded, whole, "use auto or ddp"),
            (float8.WHERE, in_float8, "works only for the blocks of an XUT", f"set {float8.WHERE}=false"),
            (OVERLAP, overlapped, "an autoencoder is trained without frozen encoders", f"set {OVERLAP}=false"),
        ):
            if wanted:
                raise UserError(what, where=key, hint=hint)
    if sharded:
        _check_sharded(config)
    if in_float8:
        _check_float8(config)


def _check_sharded(config: DictConfig) -> None:
    muon = str(plain(config, "optimizer._target_")).endswith("MuonAdamW")
    float16 = plain(config, "trainer.precision") == FLOAT16
    compressed = plain(config, "hardware.compress_gradients")
    for key, set_so, why in (
        ("optimizer", muon, "Muon needs whole matrices, and each device has only a part"),
        ("trainer.precision", float16, "float16 would scale each device's part of the gradients separately"),
        ("hardware.compress_gradients", compressed, "fsdp2 averages gradients in float32"),
    ):
        if set_so:
            hint = f"change {key}, or use trainer.strategy=ddp"
            raise UserError(f"trainer.strategy=fsdp2 does not work with this: {why}", where=key, hint=hint)


def _check_float8(config: DictConfig) -> None:
    float8.require_float8(plain(config, "trainer.accelerator"))
    for key, refused, instead in (
        ("trainer.strategy", SHARDED, "ddp"),
        ("trainer.precision", FLOAT16, "bf16-mixed"),
        ("trainer.precision", "32-true", "bf16-mixed"),
    ):
        if plain(config, key) == refused:
            what = f"{refused} does not work with {float8.WHERE}=true"
            raise UserError(what, where=key, hint=f"set {key}={instead}, or {float8.WHERE}=false")


def prepare_host(kind: str, threads: int, processes: int) -> None:
    """Set this process's CPU threads (as configured, else an even share of the cores) and its use of memory."""
    if kind == "cpu":
        keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    elif processes > 1 and kind == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def keep_compiled(folder: Path, kind: str) -> None:
    """Cache the graphs and kernels compiled for CUDA devices from now on in a folder.

    Not those for a CPU: a compiler that is killed leaves half a library, and a later run would fail on loading it.
    """
    if kind != "cuda":
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve())
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve() / "triton")


def environment() -> dict[str, Any]:
    """Return versions, commit and devices, for the run's folder."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "hdm_lightning": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cuda": torch.version.cuda,
        "devices": devices,
    }


def _commit() -> str | None:
    """Return the commit of the source tree that the package runs from; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        inside = subprocess.run(
            [*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10
        )
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if inside.returncode == 0 and result.returncode == 0 else None
