"""GPUs by name with data-sheet figures and rental price, and machines made of them.

Peak rates are dense bfloat16 tensor operations with float32 accumulation, as in a training step. GeForce cards run
these at half their rate with float16 accumulation, which is the advertised one (doubled again for sparsity). Sources:
NVIDIA's architecture white papers GA100, GA102 v2 (appendix A), AD102, GB202, the H100, H200, B200, L40S, RTX 6000
Ada and A10 data sheets. `link_gb_s` is the bus bandwidth of an all-reduce over four of them: NVLink if the board has
it, else through the host's memory (four RTX 5090 on a server board were measured at 35 GB/s, NVIDIA/nccl issue 1639;
a home board is slower). Prices are from marketplaces in 2025, for the RTX 5090 the middle of the range stated in
arXiv 2509.06068; they change monthly.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from annotated_types import Ge, Gt

from hdm_lightning.errors import UserError, did_you_mean

CPU = "cpu"
"""Name of the device of a machine without GPUs."""
HERE = "here"
"""Value of `gpus` for this machine."""


@dataclass(frozen=True)
class Gpu:
    """A GPU model."""

    name: str  # key in `GPUS`
    peak_tflops: float  # dense bfloat16 tensor rate with float32 accumulation, in 10^12 operations per second
    memory_gib: float  # memory, in 2^30 bytes
    bandwidth_gb_s: float  # memory bandwidth, in 10^9 bytes per second
    link_gb_s: float  # bus bandwidth of an all-reduce over several in one machine
    power_w: float  # board power limit
    usd_per_hour: float  # rent per GPU


@dataclass
class Host:
    """The machine around the GPUs."""

    cores: Annotated[int, Gt(0)] = 32  # CPU cores that prepare samples
    # megapixels per second that one core decodes, resizes and crops
    decode_mpx_per_core_s: Annotated[float, Gt(0)] = 40.0
    disk_mb_s: Annotated[float, Gt(0)] = 2000.0  # read speed of the disk with the shards, 10^6 bytes per second
    network_mb_s: Annotated[float, Gt(0)] = 100.0  # download speed, 10^6 bytes per second
    power_w: Annotated[float, Ge(0)] = 250.0  # power draw of the machine without its GPUs


@dataclass(frozen=True)
class Machine:
    """A machine with GPUs of one model."""

    gpu: Gpu
    count: int = 1
    host: Host = field(default_factory=Host)

    @property
    def name(self) -> str:
        """Name as on the command line, ``4x5090``."""
        return f"{self.count}x{self.gpu.name}"

    @property
    def usd_per_hour(self) -> float:
        """Rent of all GPUs together."""
        return self.count * self.gpu.usd_per_hour


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("3090", 71.2, 24, 936, 10, 350, 0.16),
        Gpu("3090ti", 80.0, 24, 1008, 10, 450, 0.18),
        Gpu("4080", 97.5, 16, 717, 10, 320, 0.20),
        Gpu("4090", 165.2, 24, 1008, 15, 450, 0.32),
        Gpu("5080", 112.6, 16, 960, 20, 360, 0.22),
        Gpu("5090", 209.5, 32, 1792, 25, 575, 0.375),
        Gpu("a10", 125.0, 24, 600, 10, 150, 0.35),
        Gpu("a6000", 154.8, 48, 768, 20, 300, 0.45),
        Gpu("6000ada", 364.2, 48, 960, 20, 300, 0.75),
        Gpu("pro6000", 503.8, 96, 1792, 30, 600, 1.20),
        Gpu("l40s", 362.0, 48, 864, 20, 350, 0.80),
        Gpu("a100-40", 312.0, 40, 1555, 230, 400, 0.80),
        Gpu("a100-80", 312.0, 80, 2039, 230, 400, 1.20),
        Gpu("h100", 989.4, 80, 3352, 360, 700, 2.20),
        Gpu("h100-pcie", 756.0, 80, 2039, 35, 350, 1.90),
        Gpu("h200", 989.4, 141, 4800, 360, 700, 2.80),
        Gpu("b200", 2250.0, 180, 8000, 700, 1000, 4.50),
    )
}
"""The GPU table; `override` replaces individual figures."""

_SIMILAR_NUMBER = 0.05
_VENDOR_WORDS = re.compile(
    r"nvidia|geforce|rtx|tesla|sxm\d?|graphics|generation|blackwell|gb\b|hbm\d?e?", re.IGNORECASE
)


def parse_gpus(text: str) -> tuple[Gpu, int]:
    """Parse ``4x5090``, ``h100`` or ``2xRTX 4090``: an optional count with an ``x``, and a name.

    Raises UserError: the name is unknown (suggests the nearest one), or the count is below 1.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?(\S.*?)\s*", str(text))
    if match is None:
        raise UserError("is empty", where="gpus", hint="use a count and a name, e.g. gpus=4x5090")
    count = int(match[1] or 1)
    if count < 1:
        raise UserError(f"{text!r} asks for {count} devices", where="gpus", hint=f"e.g. gpus=1x{match[2]}")
    gpu = find_gpu(match[2])
    if gpu is None:
        near = nearest_gpu(match[2])
        raise UserError(
            f"there is no GPU {match[2]!r} in the table (known: {', '.join(GPUS)})",
            where="gpus",
            hint=f"did you mean gpus={count}x{near}? For another device, use the nearest and override its figures: "
            f"gpus={count}x{near} gpu.peak_tflops=… gpu.memory_gib=… gpu.bandwidth_gb_s=…",
        )
    return gpu, count


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU for a table name or a driver's device name; None if it is unknown."""
    words = re.findall(r"[a-z0-9]+", _VENDOR_WORDS.sub("", name).lower())
    if "mig" in words:  # part of a card: "A100-SXM4-80GB MIG 3g.40gb"
        return None
    # Drivers add the memory or form factor to the name: "A100-SXM4-80GB", "A100-PCIE-40GB", "H100 80GB HBM3".
    # Match whole words, since an A100 is not an A10; and all of them for a GeForce, since a 4090 Laptop is not a 4090.
    for key in sorted(GPUS, key=len, reverse=True):
        for spelling in (words, [word for word in words if word != "pcie"]):
            beginnings = ["".join(spelling[:count]) for count in range(1, len(spelling) + 1)]
            if _plain(key) in (beginnings[-1:] if key.isdigit() else beginnings):
                return GPUS[key]
    return None


def nearest_gpu(name: str) -> str:
    """Return the table name with nearly the same number, else the one spelled most alike, else the paper's GPU."""
    wanted = re.search(r"\d{2,}", name)
    numbers = {key: int(found[0]) for key in GPUS if (found := re.search(r"\d{2,}", key))}
    if wanted:
        target, plain = int(wanted[0]), _plain(name)
        alike = {key: difflib.SequenceMatcher(None, plain, key).ratio() for key in numbers}
        near = min(numbers, key=lambda key: (abs(numbers[key] - target), not key.startswith(plain), -alike[key]))
        if abs(numbers[near] / max(1, target) - 1) < _SIMILAR_NUMBER:
            return near
    close = difflib.get_close_matches(_plain(name), list(GPUS), n=1, cutoff=0.5)
    return close[0] if close else "5090"


def override(gpu: Gpu, changes: Mapping[str, Any]) -> Gpu:
    """Return the GPU with the figures replaced that are not None.

    Raises:
        UserError: a figure is unknown or not positive (a price may be 0).
    """
    known = [entry.name for entry in fields(Gpu) if entry.name != "name"]
    given = {key: value for key, value in changes.items() if value is not None}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"unknown key '{key}'", where=f"gpu.{key}", hint=did_you_mean(key, known))
        least = 0.0 if key == "usd_per_hour" else 1e-9
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise UserError(f"{value!r} is not a positive number", where=f"gpu.{key}", hint="use one")
    figures: dict[str, Any] = {key: float(value) for key, value in given.items()}
    return replace(gpu, **figures)


def _plain(name: str) -> str:
    """Return the name in lower case, without vendor words, spaces and dashes."""
    return re.sub(r"[\s_-]+", "", _VENDOR_WORDS.sub("", name)).lower()
