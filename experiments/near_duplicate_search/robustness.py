"""How many bits of an image's perceptual hash change when it is resized, reencoded, or marked in a corner."""

import io
import sys

import numpy as np
from PIL import Image, ImageDraw

from hdm_lightning.data.decode import load_upright
from hdm_lightning.datasets.near_duplicates import perceptual_hash
from hdm_lightning.datasets.shard_work import samples_of, shards_in

BITS = (0, 2, 4, 6, 8, 12)
MARKED = 0.12
"""Share of each side that the mark covers."""


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def copies(image: Image.Image) -> dict[str, bytes]:
    """Return altered copies of an image."""
    marked, (width, height) = image.copy(), image.size
    corner = (round(width * (1 - MARKED)), round(height * (1 - MARKED)), width, height)
    ImageDraw.Draw(marked).rectangle(corner, fill="red")
    half = image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.LANCZOS)
    return {
        "half the size": encoded(half, "PNG"),
        "JPEG, quality 50": encoded(image, "JPEG", quality=50),
        "WebP, quality 60": encoded(image, "WEBP", quality=60),
        "a red corner": encoded(marked, "PNG"),
    }


def main(place: str) -> None:
    """Print a line per kind of change, with the share of copies within each number of bits."""
    changed: dict[str, list[int]] = {}
    for shard in shards_in(place):
        for _, sample in samples_of(shard):
            assert not isinstance(sample, str)
            image, own = load_upright(sample.image()), perceptual_hash(sample.image())
            for name, data in copies(image).items():
                changed.setdefault(name, []).append((own ^ perceptual_hash(data)).bit_count())
    for name, bits in changed.items():
        shares = " | ".join(f"{(np.array(bits) <= most).mean():.1%}" for most in BITS)
        print(f"| {name} | {shares} |")


if __name__ == "__main__":
    main(sys.argv[1])
