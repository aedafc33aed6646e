"""Cost of `hdm-shards encode` and `encode-captions` before training on latents or text states from disk.

Every image is encoded once, whole, at each resolution; every caption once.
"""

from dataclasses import dataclass

from hdm_lightning.profiling.duration import Assumptions, billed
from hdm_lightning.profiling.gpus import Machine
from hdm_lightning.profiling.planned_run import LENGTHS, WHOLE_IMAGE, Recipe


@dataclass(frozen=True)
class EncodingForecast:
    """Forecast of one set of latents, or of the states of all captions."""

    resolution: int | None  # short side in pixels; None: captions
    images: int  # or captions, one per image
    flops: float  # per whole image, or per caption on average
    total_flops: float  # for all of them
    disk_gb: float  # size of the set, 10^9 bytes
    images_per_s: float  # all devices together
    hours: float  # wall clock
    device_hours: float  # hours × devices
    kwh: float  # electricity
    rent_usd: float  # device hours × the GPU's price
    electricity_usd: float  # kwh × the price of electricity
    binds: str  # bottleneck: computation or data


def encoding_forecast(recipe: Recipe, resolution: int, machine: Machine, assumptions: Assumptions) -> EncodingForecast:
    """Forecast the encoding of all images at one resolution, with separate shards per device.

    Images are decoded again for each resolution. Disks and decoders are those of the training run.
    """
    host, dataset, encoder = machine.host, recipe.dataset, recipe.autoencoder
    long_side = round(WHOLE_IMAGE * resolution / encoder.factor) * encoder.factor
    flops = encoder.encode_flops(resolution, long_side)
    traffic = encoder.encode_traffic_bytes(resolution, long_side, recipe.element_bytes)
    encoded = _rate(machine, flops, traffic, assumptions.utilisation)
    decoded = host.cores * host.decode_mpx_per_core_s / dataset.image_mpx
    given = min(decoded, host.disk_mb_s * 1e3 / dataset.image_kb)
    disk_gb = recipe.latent_kb(resolution) * dataset.images / 1e6
    binds = "data" if given < encoded else "compute (autoencoder)"
    return _billed(resolution, dataset.images, flops, disk_gb, min(encoded, given), binds, machine, assumptions)


def captions_forecast(recipe: Recipe, machine: Machine, assumptions: Assumptions) -> EncodingForecast:
    """Forecast the encoding of one caption per image, batched by length, so that there is no padding."""
    lengths, images = recipe.stored_lengths(), recipe.dataset.images
    flops = sum(map(recipe.text.flops, lengths)) / LENGTHS
    traffic = sum(recipe.text.traffic_bytes(each, recipe.element_bytes) for each in lengths) / LENGTHS
    encoded = _rate(machine, flops, traffic, assumptions.utilisation)
    disk_gb = recipe.state_kb(stored_tokens(recipe)) / 1e6
    written = machine.host.disk_mb_s * images / (1e3 * disk_gb)
    binds = "data" if written < encoded else "compute (text encoder)"
    return _billed(None, images, flops, disk_gb, min(encoded, written), binds, machine, assumptions)


def stored_tokens(recipe: Recipe) -> float:
    """Return the total number of tokens whose states are stored."""
    return sum(recipe.stored_lengths()) / LENGTHS * recipe.dataset.images


def _rate(machine: Machine, flops: float, traffic: float, utilisation: float) -> float:
    """Return images or captions per second, with separate shards per device."""
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
    bill = billed(images / rate / 3600, machine, assumptions)
    total = float(flops) * images
    return EncodingForecast(resolution, images, flops, total, disk_gb, images_per_s=rate, binds=binds, **bill)
