"""Time and memory of the exact search for near duplicates, by number of hashes and distance.

Hashes are random, like those of unrelated images, except for one in ten: a copy of another with up to six bits changed.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from hdm_lightning.datasets.near_duplicates import better_copies

HERE = Path(__file__).parent
DISTANCES = {100_000: (0, 4, 8), 1_000_000: (0, 4), 4_000_000: (4,)}
"""Numbers of bits by number of hashes."""


def hashes(count: int, seed: int) -> np.ndarray:
    """Return `count` hashes, uint64."""
    random = np.random.default_rng(seed)
    found = random.integers(0, 1 << 64, size=count, dtype=np.uint64)
    copies = random.choice(count, count // 10, replace=False)
    found[copies] = found[random.integers(0, count, len(copies))]
    for _ in range(6):
        changed = copies[random.random(len(copies)) < 0.5]
        found[changed] ^= np.uint64(1) << random.integers(0, 64, len(changed), dtype=np.uint64)
    return found


def search(given: np.ndarray, distance: int) -> dict[str, float]:
    """Search once, visiting the hashes in a random order; memory is the peak of the whole process so far."""
    order, begin = np.random.default_rng(1).permutation(len(given)), time.process_time()
    copies = int((better_copies(given, order, distance) >= 0).sum())
    seconds = round(time.process_time() - begin, 2)
    return {"hashes": len(given), "bits": distance, "copies": copies, "cpu_s": seconds, "peak_gb": peak_gb()}


def peak_gb() -> float:
    """Return the peak memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def main() -> None:
    """Write and print a row per search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=list(DISTANCES), help="numbers of hashes")
    parser.add_argument("--distances", nargs="+", type=int, help="in bits, for every number (default: as recorded)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    arguments = parser.parse_args()
    before, rows = peak_gb(), []
    for count in arguments.counts:
        given = hashes(count, arguments.seed)
        for distance in arguments.distances or DISTANCES.get(count, (4,)):
            rows.append(search(given, distance))
            print(" | ".join(f"{value:,}" for value in rows[-1].values()), flush=True)
    found = {"seed": arguments.seed, "peak_gb_before": before, "searches": rows}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
