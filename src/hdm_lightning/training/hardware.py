"""Devices and precision: what `auto` means on the machine at hand."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.errors import UserError
from hdm_lightning.precision import half_dtype
from hdm_lightning.training.host_memory import keep_freed_memory
from hdm_lightning.training.settings import TrainerSettings
from hdm_lightning.version import __version__

FLOAT16 = "16-mixed"
PRECISIONS = ("32-true", "bf16-mixed", FLOAT16)
SHARDED = "fsdp2"
STRATEGIES = ("auto", "ddp", SHARDED)


def accelerator(settings: TrainerSettings) -> str:
    """`cpu` or `cuda`.

    Raises:
        UserError: for an unknown name, or cuda where there is none.
    """
    if settings.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.accelerator not in ("cpu", "cuda"):
        raise UserError(
            f"'{settings.accelerator}' is none of auto, cpu, cuda", where="trainer.accelerator", hint="trainer=auto"
        )
    if settings.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device is visible", where="trainer.accelerator", hint="use trainer=cpu or trainer=auto"
        )
    return settings.accelerator


def local_devices(settings: TrainerSettings) -> int:
    """Processes on this machine, one per device."""
    if settings.devices < 0:
        raise UserError(f"{settings.devices} is negative", where="trainer.devices", hint="0 means all devices")
    if accelerator(settings) == "cpu":
        return max(1, settings.devices)
    present = torch.cuda.device_count()
    if settings.devices > present:
        raise UserError(
            f"{settings.devices} devices asked for, {present} present", where="trainer.devices", hint="0 means all"
        )
    return settings.devices or present


def precision(settings: TrainerSettings) -> Any:
    """Lightning's name of the precision.

    Raises:
        UserError: for a precision that does not train well, or that the device has not.
    """
    kind, name = accelerator(settings), settings.precision
    if name == "auto":
        if kind == "cpu":
            return "32-true"
        return "bf16-mixed" if half_dtype() == torch.bfloat16 else FLOAT16
    if name not in PRECISIONS:
        raise UserError(
            f"'{name}' is none of auto, {', '.join(PRECISIONS)}: weights kept in half precision lose small updates",
            where="trainer.precision",
            hint="trainer.precision=auto",
        )
    if name == FLOAT16 and kind == "cpu":
        raise UserError(
            "a CPU does not train in float16", where="trainer.precision", hint="use 32-true, bf16-mixed or auto"
        )
    return name


def check_strategy(settings: TrainerSettings, optimizer: str) -> None:
    """The strategy is known, and fits the precision, the optimizer and the other settings of the trainer.

    Raises:
        UserError: naming the key, and the other one that it does not go with.
    """
    if settings.strategy not in STRATEGIES:
        what = f"'{settings.strategy}' is none of {', '.join(STRATEGIES)}"
        raise UserError(what, where="trainer.strategy", hint="use auto")
    if settings.strategy != SHARDED:
        return
    for key, set_so, why in (
        ("optimizer.name", optimizer == "muon", "Muon needs whole matrices, which no device holds"),
        ("trainer.precision", precision(settings) == FLOAT16, "float16 scales gradients, each device by its own part"),
        ("trainer.compress_gradients", settings.compress_gradients, "it averages gradients in float32"),
        ("trainer.static_graph", settings.static_graph, "it has no graph of parameters that could be static"),
    ):
        if set_so:
            hint = f"change {key}, or use trainer.strategy=ddp"
            raise UserError(f"trainer.strategy=fsdp2 does not go with this: {why}", where=key, hint=hint)


def prepare_host(settings: TrainerSettings, processes: int) -> None:
    """CPU threads of this process (as asked for, else an even share of the cores) and its use of memory."""
    if accelerator(settings) == "cpu":
        keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    elif processes > 1 and accelerator(settings) == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def environment() -> dict[str, Any]:
    """Versions, commit and devices, for the run's folder."""
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
    """Commit of the source tree that the package runs from; None for an installed wheel."""
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
