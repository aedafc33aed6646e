"""What `hdm-shards encode` and `encode-captions` take before a training begins that reads what they make.

Every image is encoded once, whole, at each resolution; every caption once.
"""

from dataclasses import dataclass

from hdm_lightning.profiling.duration import Assumptions
from hdm_lightning.profiling.gpus import Machine
from hdm_lightning.profiling.planned_run import LENGTHS, WHOLE_IMAGE, Recipe


@dataclass(frozen=True)
class EncodingForecast:
    """One set of latents, or the states of all captions, with the totals that a stage has."""

    resolution: int | None  # short side in pixels; None: captions
    images: int  # or captions, of which each image has one
    flops: float  # of one whole image, or of one caption on average
    total_flops: float  # of all of them
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
    host, dataset, encoder = machine.host, recipe.dataset, recipe.autoencoder
    long_side = round(WHOLE_IMAGE * resolution / encoder.factor) * encoder.factor
    flops = encoder.encode_flops(resolution, long_side)
    traffic = encoder.encode_traffic_bytes(resolution, long_side, recipe.element_bytes)
    encoded = _rate(machine, flops, traffic, utilisation)
    decoded = host.cores * host.decode_mpx_per_core_s / dataset.image_mpx
    given = min(decoded, host.disk_mb_s * 1e3 / dataset.image_kb)
    disk_gb = recipe.latent_kb(resolution) * dataset.images / 1e6
    binds = "data" if given < encoded else "compute (autoencoder)"
    return _billed(resolution, dataset.images, flops, disk_gb, min(encoded, given), binds, machine, assumptions)


def captions_forecast(
    recipe: Recipe, machine: Machine, assumptions: Assumptions, utilisation: float
) -> EncodingForecast:
    """Forecast the encoding of one caption an image, those of near lengths together, so that there is no padding."""
    lengths, images = recipe.stored_lengths(), recipe.dataset.images
    flops = sum(map(recipe.text.flops, lengths)) / LENGTHS
    traffic = sum(recipe.text.traffic_bytes(each, recipe.element_bytes) for each in lengths) / LENGTHS
    encoded = _rate(machine, flops, traffic, utilisation)
    disk_gb = recipe.state_kb(stored_tokens(recipe)) / 1e6
    written = machine.host.disk_mb_s * images / (1e3 * disk_gb)
    binds = "data" if written < encoded else "compute (text encoder)"
    return _billed(None, images, flops, disk_gb, min(encoded, written), binds, machine, assumptions)


def stored_tokens(recipe: Recipe) -> float:
    """Tokens of all captions whose states are on disk."""
    return sum(recipe.stored_lengths()) / LENGTHS * recipe.dataset.images


def _rate(machine: Machine, flops: float, traffic: float, utilisation: float) -> float:
    """Images or captions a second, the devices each on shards of their own."""
    gpu = machine.gpu
    return machine.count * utilisation / (flops / (gpu.peak_tflops * 1e12) + traffic / (gpu.bandwidth_gb_s * 1e9))


def _billed(
    resolution: int | None,
    images: int,
    flops: float,
    disk_gb: float,
    rate: float,
    binds: str,
    machine: Machine,
    assumptions: Assumptions,
) -> EncodingForecast:
    hours = images / rate / 3600
    kwh = hours * (machine.count * machine.gpu.power_w * assumptions.power_share + machine.host.power_w) / 1000
    return EncodingForecast(
        resolution=resolution,
        images=images,
        flops=flops,
        total_flops=float(flops) * images,
        disk_gb=disk_gb,
        images_per_s=rate,
        hours=hours,
        device_hours=hours * machine.count,
        kwh=kwh,
        rent_usd=hours * machine.usd_per_hour,
        electricity_usd=kwh * assumptions.usd_per_kwh,
        binds=binds,
    )
