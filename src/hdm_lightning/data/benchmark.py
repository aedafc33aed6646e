"""Speed of the data path: this project's pipeline compared with the plain one and with bare JPEG decoding.

Shapes: H×W pixels of a crop.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from hdm_lightning.data.crops import Crop, CropRules
from hdm_lightning.data.decode import decode, reduction
from hdm_lightning.data.loader import StreamLoader
from hdm_lightning.data.randomness import Draws
from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import Tokenize

SIZES = ((1024, 1024), (832, 1216), (1216, 832), (896, 1152))
"""Height and width of the benchmark's images, about a megapixel each."""

Pipeline = Callable[[bytes, int], object]


@dataclass(frozen=True)
class DecodingSpeed:
    """Images per second of one core at one resolution.

    `ours`, `plain` and `bound` are the speeds of `decode_ours`, `decode_plain` and `decode_bare`; `mean_difference` is
    between the pixels of the first two, in gray levels.
    """

    resolution: int
    images: int
    bytes_per_image: float
    ours: float
    plain: float
    bound: float
    mean_difference: float

    @property
    def over_plain(self) -> float:
        """Speedup over the plain pipeline."""
        return self.ours / self.plain

    @property
    def of_bound(self) -> float:
        """Fraction of the bare decoder's speed."""
        return self.ours / self.bound


def decode_ours(data: bytes, resolution: int) -> tuple[NDArray[np.uint8], Crop]:
    """Run this project's pipeline up to the crop that goes into a batch: uint8 (3,H,W)."""
    image, crop = decode(data, _chooser(data, resolution))
    return np.ascontiguousarray(image), crop


def decode_plain(data: bytes, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the plain pipeline: full decode, resize, crop, float tensor (3,H,W) in [-1, 1], position map (H,W,2)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    crop = _chooser(data, resolution)(image.height, image.width)
    image = image.resize((crop.full_width, crop.full_height), Image.Resampling.BICUBIC)
    image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1
    y, x = torch.linspace(-1, 1, crop.full_height), torch.linspace(-1, 1, crop.full_width)
    positions = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
    rows, columns = slice(crop.top, crop.top + crop.height), slice(crop.left, crop.left + crop.width)
    return pixels, positions[rows, columns].contiguous()


def decode_bare(data: bytes, resolution: int) -> NDArray[np.uint8]:
    """Run libjpeg-turbo alone, at the scale that `decode_ours` uses: uint8 (H,W,3)."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    crop = _chooser(data, resolution)(height, width)
    scale = reduction(height, width, crop.full_height, crop.full_width)
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data, "RGB", min_height=ceil(height / scale), min_width=ceil(width / scale)
    )
    return pixels


def measure_decoding(resolution: int, *, images: Sequence[bytes] | None = None, repeats: int = 10) -> DecodingSpeed:
    """Time the three pipelines in turn on one core; the fastest repeat of each image counts.

    Args:
        resolution: side of the crop in pixels.
        images: JPEGs; None for synthetic photographs of a megapixel.
        repeats: how often each image is decoded by each pipeline.
    """
    images = images if images is not None else benchmark_images()
    pipelines: tuple[Pipeline, ...] = (decode_ours, decode_plain, decode_bare)
    best = np.full((len(images), len(pipelines)), np.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            for number, data in enumerate(images):
                for column, pipeline in enumerate(pipelines):
                    begin = time.process_time()
                    pipeline(data, resolution)
                    best[number, column] = min(best[number, column], time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    ours, plain, bound = (len(images) / best.sum(axis=0)).tolist()
    return DecodingSpeed(
        resolution=resolution,
        images=len(images),
        bytes_per_image=float(np.mean([len(data) for data in images])),
        ours=ours,
        plain=plain,
        bound=bound,
        mean_difference=float(np.mean([mean_difference(data, resolution) for data in images])),
    )


def mean_difference(data: bytes, resolution: int) -> float:
    """Return the mean difference in gray levels between this project's crop and Pillow's full decode and resize."""
    ours, _ = decode_ours(data, resolution)
    plain, _ = decode_plain(data, resolution)
    return float(np.abs(ours - (plain.numpy() + 1) * 127.5).mean())


@dataclass(frozen=True)
class LoadingSpeed:
    """Samples per second of a loader with some worker processes, after its first batch."""

    workers: int
    samples_per_s: float
    first_batch_s: float


def measure_loading(config: StreamConfig, tokenize: Tokenize, *, batch_size: int, batches: int) -> LoadingSpeed:
    """Time a loader on this machine, from shards to batches."""
    begin = time.perf_counter()
    loader = StreamLoader(config, Plan(config), tokenize, batch_size=batch_size)
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter()
    for _ in islice(iterator, batches):
        pass
    rate = batches * batch_size / (time.perf_counter() - first)
    return LoadingSpeed(loader.workers, rate, first - begin)


def benchmark_images(count: int = 8) -> list[bytes]:
    """Return JPEGs of about a megapixel and 1.6 bits per pixel, like photographs on the web."""
    files = []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        buffer = io.BytesIO()
        synthetic_photograph(height, width, number).save(buffer, "JPEG", quality=88)
        files.append(buffer.getvalue())
    return files


def synthetic_photograph(height: int, width: int, seed: int) -> Image.Image:
    """Return an image with the statistics of photographs: amplitudes that fall with frequency, surfaces with edges.

    Noise whose amplitude falls as frequency^-1.4 is drawn on overlapping discs of random sizes ("dead leaves").
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(1024)[:, None], np.fft.rfftfreq(1280)[None])
    frequency[0, 0] = np.inf
    noise = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((1024, 1280))) / frequency**1.4) for _ in range(4)]
    tiled = [np.tile(layer / layer.std(), (2, 2))[:height, :width] for layer in noise]
    pixels = 128 + 36 * tiled[0][..., None] + 9 * np.stack(tiled[1:], -1)
    for _ in range(60):
        y, x, radius = rng.integers(height), rng.integers(width), min(300, int(4 + 15 * rng.pareto(2)))
        part = pixels[max(0, y - radius) : y + radius, max(0, x - radius) : x + radius]
        rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
        inside = (rows - min(y, radius)) ** 2 + (columns - min(x, radius)) ** 2 < radius**2
        part[inside] = 0.5 * part[inside] + 0.5 * rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _chooser(data: bytes, resolution: int) -> Callable[[int, int], Crop]:
    rules, draws = CropRules(), Draws("benchmark", len(data))
    return lambda height, width: rules.choose(height, width, (resolution, resolution), draws)
