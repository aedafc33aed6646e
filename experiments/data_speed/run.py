"""Measure the speed of the data path on one core: python experiments/data_speed/run.py [--repeats 40]"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import PIL
import torch
from PIL import features

from hdm_lightning.data.benchmark import benchmark_images, measure_decoding
from hdm_lightning.data.loader import StreamLoader
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.datasets.shapes import build_shapes


def main() -> None:
    """Measure, print, and write result.json beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = benchmark_images()
    decoding = []
    for resolution in (256, 512):
        speed = measure_decoding(resolution, images=images, repeats=arguments.repeats)
        row = {**asdict(speed), "times plain": speed.over_plain, "share of bound": speed.of_bound}
        decoding.append({name: round(value, 3) for name, value in row.items()})
    result = {"machine": machine(), "decoding": decoding, "small pictures": small_pictures()}
    text = json.dumps(result, indent=1)
    print(text)
    Path(__file__).with_name("result.json").write_text(text + "\n")


def small_pictures() -> dict[str, float]:
    """Return samples per CPU second for 64-pixel WebP samples through the loader in the main process."""
    with tempfile.TemporaryDirectory() as folder:
        build_shapes(folder, count=2000, processes=1)
        config = StreamConfig((Source((folder,)),), resolution=64, context_length=32)
        cached = StreamConfig((Source((folder,)),), resolution=64, context_length=32, memory_cache_gb=1.0)
        return {"read and decoded": rate(config, 0), "in memory": rate(cached, 2000)}


def rate(config: StreamConfig, warm: int) -> float:
    """Return samples per CPU second after `warm` warm-up samples."""
    batches = iter(StreamLoader(config, Plan(config), words, batch_size=50))
    list(islice(batches, 2 + warm // 50))
    begin = time.process_time()
    list(islice(batches, 60))
    return round(3000 / (time.process_time() - begin))


def words(caption: str) -> tuple[list[int], int]:
    """Tokenize at next to no cost."""
    count = len(caption.split())
    return [1] * count, count


def machine() -> dict[str, object]:
    """Return what the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "kernel": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
    }


if __name__ == "__main__":
    main()
