"""Time and memory of a plan of hundreds of millions of samples: `python experiments/large_index/measure.py`.

The data set is only an index, with as many shards as img2dataset makes of COYO-700M, 10,000 samples each: JPEG, caption
and record of images whose short side is at most 512 px. 200 shards are different, the others repeat their columns with
other names and checksums. A separate process then does what a rank does before its first sample.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hdm_lightning.data.crops import Buckets, CropRules
from hdm_lightning.data.index import Index, write_index
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.sample_table import Form, Layout
from hdm_lightning.data.shard_record import ShardRecord, columns_of
from hdm_lightning.data.tar import BLOCK

DIFFERENT = 200
LAYOUT = Layout(0, (("jpg", 1), ("txt", 1), ("json", 1)), 0)
CROPS = {
    "squares": CropRules(max_upscale=1.5, max_aspect=3.0),
    "buckets": CropRules(max_upscale=1.5, max_aspect=3.0, buckets=Buckets(block=1024)),
}
"""The limits of `data=coyo700m`."""


def shard(random: np.random.Generator, samples: int) -> ShardRecord:
    """Return the record of a shard of random images."""
    short = np.minimum(512, random.lognormal(6.3, 0.6, samples)).astype(int) + 1
    long = (short * (1 + random.gamma(1.5, 0.3, samples))).astype(int)
    tall = random.random(samples) < 0.4
    shapes = np.where(tall[:, None], np.stack([long, short], 1), np.stack([short, long], 1))
    image = (short * long * random.uniform(0.08, 0.3, samples)).astype(int) + 500
    text, record = random.poisson(60, samples), random.poisson(700, samples)
    checks = random.integers(0, 1 << 16, samples)
    sizes = zip(image.tolist(), text.tolist(), record.tolist(), strict=True)
    forms = [Form(LAYOUT, 9, each, check) for each, check in zip(sizes, checks.tolist(), strict=True)]
    blocks = sum(3 + sum(-(-size // BLOCK) for size in form.sizes) for form in forms)
    columns = columns_of(forms, [tuple(each) for each in shapes.tolist()])
    return ShardRecord("", samples, (blocks + 2) * BLOCK, "", 0, **columns)


def write(folder: Path, shards: int, samples: int) -> None:
    """Write the index of the data set."""
    random = np.random.default_rng(0)
    different = [shard(random, samples) for _ in range(min(DIFFERENT, shards))]
    records = []
    for number in range(shards):
        like = vars(different[number % len(different)])
        records.append(ShardRecord(**{**like, "name": f"{number:05d}.tar", "sha256": random.bytes(32).hex()}))
    write_index(Index(str(folder), tuple(records)), folder / "index.json")


def measured(folder: Path, crop: str) -> dict[str, float]:
    """Return seconds and GB (beyond a bare process) that a rank needs for its plan and to locate 1,000 samples."""
    before = memory()
    begin, used = time.perf_counter(), time.process_time()
    config = StreamConfig(
        (Source((str(folder),)),), 256, 77, crop=CROPS[crop], stage="px256", seed=0, lanes=96, window=32
    )
    plan = Plan(config)
    wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - used
    begin = time.process_time()
    for position in np.random.default_rng(1).integers(0, plan.samples, 1000).tolist():
        place = plan.locate(position)
        plan.parts[place.part].shards[place.shard].table()
    after = memory()
    return {
        "samples": plan.samples,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "place_ms": time.process_time() - begin,
        "own_gb": after["RssAnon"] - before["RssAnon"],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 - (before["RssAnon"] + before["RssFile"]),
        "mapped_gb": after["RssFile"] - before["RssFile"],
    }


def memory() -> dict[str, float]:
    """Return this process's memory in GB: its own, and file pages, which processes share and the system can reclaim."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(rest.split()[0]) / 1e6 for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name
    }


def main() -> None:
    """Write the data set into a temporary folder, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=70_000)
    parser.add_argument("--samples", type=int, default=10_000, help="per shard")
    parser.add_argument("--crops", nargs="+", choices=list(CROPS), default=list(CROPS))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure, arguments.crops[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments.shards, arguments.samples)
        sizes = {path.suffix[1:]: path.stat().st_size / 1e9 for path in sorted(Path(folder).iterdir())}
        found: dict[str, object] = {"shards": arguments.shards, "samples": arguments.samples, "disk_gb": sizes}
        for crop in arguments.crops:
            command = [sys.executable, __file__, "--measure", folder, "--crops", crop]
            run = subprocess.run(
                command, stdout=subprocess.PIPE, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            found[crop] = json.loads(run.stdout)
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
