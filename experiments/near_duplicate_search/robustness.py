"""How many bits of an image's perceptual hash change when it is resized, reencoded, or marked in a corner.

Also how many images of the set itself have a better copy within the default distance.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hdm_lightning.data.decode import load_upright
from hdm_lightning.datasets.near_duplicates import better_copies, perceptual_hash
from hdm_lightning.datasets.shard_work import samples_of, shards_in

BITS = (0, 2, 4, 6, 8, 12)
DEFAULT_BITS = 4
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


def main() -> None:
    """Write and print how many of the copies of each kind are within each number of bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", help="a folder of shards")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("robustness.json"))
    arguments = parser.parse_args()
    changed: dict[str, list[int]] = {}
    hashes: list[int] = []
    for shard in shards_in(arguments.place):
        for _, sample in samples_of(shard):
            assert not isinstance(sample, str)
            image, own = load_upright(sample.image()), perceptual_hash(sample.image())
            hashes.append(own)
            for name, data in copies(image).items():
                changed.setdefault(name, []).append((own ^ perceptual_hash(data)).bit_count())
    within = {name: {str(most): sum(bit <= most for bit in bits) for most in BITS} for name, bits in changed.items()}
    among = better_copies(np.array(hashes, np.uint64), np.arange(len(hashes)), DEFAULT_BITS)
    found = {"images": len(hashes), "near_duplicates": int((among >= 0).sum()), "copies_within_bits": within}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
