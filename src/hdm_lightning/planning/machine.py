"""The machine that a schedule is planned for: its GPUs and the host around them."""

from dataclasses import dataclass

from hdm_lightning.planning.gpus import Gpu


@dataclass(frozen=True)
class Host:
    """What feeds the GPUs.

    Attributes:
        cores: CPU cores that prepare samples.
        decode_mpx_per_core_s: megapixels that one core decodes, resizes and crops in a second.
        disk_mb_s: reading speed of the disk with the shards, 10^6 bytes a second.
        network_mb_s: download speed, 10^6 bytes a second.
        power_w: what the machine draws beside its GPUs.
    """

    cores: int = 32
    decode_mpx_per_core_s: float = 40.0
    disk_mb_s: float = 2000.0
    network_mb_s: float = 100.0
    power_w: float = 250.0


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in one machine.

    Attributes:
        gpu: the kind.
        count: how many.
        host: the rest of the machine.
    """

    gpu: Gpu
    count: int = 1
    host: Host = Host()

    @property
    def name(self) -> str:
        """As on the command line, ``4x5090``."""
        return f"{self.count}x{self.gpu.name}"

    @property
    def usd_per_hour(self) -> float:
        """Rent of all GPUs."""
        return self.count * self.gpu.usd_per_hour
