"""How the latent of a crop cut from the whole image's latent differs from that of the crop alone, by place in the crop.

python experiments/latent_borders/measure.py SHARDS --vae NAME --resolution 256 --samples 200 --out FILE
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdm_lightning import load_autoencoder
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.decode import decode, upright_size
from hdm_lightning.data.latent_sets import LatentFormat
from hdm_lightning.data.randomness import Draws
from hdm_lightning.data.reader import Reader
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.sample_plan import Plan

RINGS = (0, 1, 2, 4, 8, 1_000_000)
"""Cells from a border of the crop that is inside the image; the last class is everything farther away."""


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--vae", required=True)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    vae: Any = load_autoencoder(given.vae, where="--vae").to(given.device)
    form = LatentFormat(given.resolution, vae.factor, vae.channels, "", given.vae, 1)
    config = StreamConfig((Source((given.shards,)),), given.resolution, 1)
    plan, rules = Plan(config), CropRules()
    reader, rows, index = Reader(plan, config), [], 0
    while len(rows) < given.samples and index < plan.samples:
        raw = reader.read(plan.locate(index))
        height, width = upright_size(raw.image())
        crop = rules.choose(height, width, (given.resolution,) * 2, Draws(0, "borders", index), grid=form.factor)
        index += 1
        if crop.full_height == crop.full_width:
            continue  # the crop is the whole image
        pixels, _ = decode(raw.image(), form.whole)
        image = torch.from_numpy(np.ascontiguousarray(pixels))[None].to(given.device).float() / 127.5 - 1
        rows.append(compared(vae, image, crop.top, crop.left, given.resolution))
    report = summary(rows, given.resolution)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def compared(vae: Any, image: Tensor, top: int, left: int, side: int) -> dict[str, Any]:
    """Return the differences for one image (1,3,H,W) in [-1, 1], in standard deviations of latents."""
    cells, factor = side // vae.factor, vae.factor
    top_cell, left_cell = top // factor, left // factor
    alone = vae.encode(image[..., top : top + side, left : left + side])
    cut = vae.encode(image)[..., top_cell : top_cell + cells, left_cell : left_cell + cells]
    squares = (cut - alone).square().mean(dim=1)[0].cpu().numpy()
    distance = inner_distance(*(each // factor for each in image.shape[-2:]), top_cell, left_cell, cells)
    classes = [squares[(distance >= low) & (distance < high)] for low, high in pairwise(RINGS)]
    error = float((vae.decode(cut) - vae.decode(alone)).square().mean())
    return {"squares": [[float(each.sum()), each.size] for each in classes], "decoded_mse": error}


def inner_distance(height: int, width: int, top: int, left: int, cells: int) -> np.ndarray[Any, Any]:
    """Return the distance in cells (cells, cells) of a crop from its nearest side that is not a side of the image."""
    far = RINGS[-1] - 1
    places = np.arange(cells)
    sides = []
    for begin, whole, axis in ((top, height, 0), (left, width, 1)):
        before = places if begin > 0 else np.full(cells, far)
        after = cells - 1 - places if begin + cells < whole else np.full(cells, far)
        sides.append(np.expand_dims(np.minimum(before, after), 1 - axis))
    return np.minimum(*np.broadcast_arrays(*sides))


def summary(rows: list[dict[str, Any]], resolution: int) -> dict[str, Any]:
    """Return the root mean squares by class, over all images."""
    names = [f"{low} to {high - 1} cells" if high < RINGS[-1] else f"{low} and more" for low, high in pairwise(RINGS)]
    sums = np.array([row["squares"] for row in rows]).sum(axis=0)
    rms = {name: float(np.sqrt(total / max(1, count))) for name, (total, count) in zip(names, sums, strict=True)}
    psnr_db = 10 * np.log10(4 / np.mean([row["decoded_mse"] for row in rows]))
    whole = float(np.sqrt(sums[:, 0].sum() / sums[:, 1].sum()))
    sizes = {"resolution": resolution, "images": len(rows)}
    return {**sizes, "rms_all": whole, "rms_by_distance": rms, "decoded_psnr_db": float(psnr_db)}


if __name__ == "__main__":
    main()
