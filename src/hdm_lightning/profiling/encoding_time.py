"""What `hdm-shards encode` takes before a training on latents begins: every image once, whole, at each resolution."""

from dataclasses import dataclass

from hdm_lightning.profiling.duration import Assumptions
from hdm_lightning.profiling.gpus import Machine
from hdm_lightning.profiling.planned_run import WHOLE_IMAGE, Recipe


@dataclass(frozen=True)
class EncodingForecast:
    """One set of latents, with the totals that a stage has."""

    resolution: int  # short side in pixels
    images: int
    flops: int  # of one whole image
    total_flops: float  # of all images
    disk_gb: float  # of the set, 10^9 bytes
    images_per_s: float  # all devices together
    hours: float  # wall clock
    device_hours: float  # hours times devices
    kwh: float  # electricity
    rent_usd: float  # device hours at the GPU's price
    electricity_usd: float  # the energy at its price
    binds: str  # the devices or the data


def encoding_forecast(
    recipe: Recipe, resolution: int, machine: Machine, assumptions: Assumptions, utilisation: float
) -> EncodingForecast:
    """Forecast the encoding of all images at one resolution, the devices each on shards of their own.

    The images are decoded anew for each resolution. Disks and decoders are those of the training.
    """
    gpu, host, dataset, encoder = machine.gpu, machine.host, recipe.dataset, recipe.autoencoder
    long_side = round(WHOLE_IMAGE * resolution / encoder.factor) * encoder.factor
    flops = encoder.encode_flops(resolution, long_side)
    traffic = encoder.encode_traffic_bytes(resolution, long_side, recipe.element_bytes)
    device_s = (flops / (gpu.peak_tflops * 1e12) + traffic / (gpu.bandwidth_gb_s * 1e9)) / utilisation
    decoded = host.cores * host.decode_mpx_per_core_s / dataset.image_mpx
    encoded, given = machine.count / device_s, min(decoded, host.disk_mb_s * 1e3 / dataset.image_kb)
    rate = min(encoded, given)
    hours = dataset.images / rate / 3600
    kwh = hours * (machine.count * gpu.power_w * assumptions.power_share + host.power_w) / 1000
    return EncodingForecast(
        resolution=resolution,
        images=dataset.images,
        flops=flops,
        total_flops=float(flops) * dataset.images,
        disk_gb=recipe.latent_kb(resolution) * dataset.images / 1e6,
        images_per_s=rate,
        hours=hours,
        device_hours=hours * machine.count,
        kwh=kwh,
        rent_usd=hours * machine.usd_per_hour,
        electricity_usd=kwh * assumptions.usd_per_kwh,
        binds="data" if given < encoded else "compute (autoencoder)",
    )
