"""Time and memory of the exact search for near duplicates, by number of hashes and distance.

Hashes are random, like those of unrelated images, except for one in ten: a copy of another with up to six bits changed.
"""

import argparse
import resource
import time

import numpy as np

from hdm_lightning.datasets.near_duplicates import better_copies


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


def main() -> None:
    """Print a line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=[100_000, 1_000_000, 4_000_000])
    parser.add_argument("--distances", nargs="+", type=int, default=[0, 4])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for count in arguments.counts:
        given, order = hashes(count, arguments.seed), np.random.default_rng(1).permutation(count)
        for distance in arguments.distances:
            begin = time.process_time()
            copies = int((better_copies(given, order, distance) >= 0).sum())
            seconds = time.process_time() - begin
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"| {count:,} | {distance} | {copies:,} | {seconds:.1f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
