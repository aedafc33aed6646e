"""Memory stays flat over a long stream."""

import gc
import os
from itertools import islice

from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


def resident_mb():
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * PAGE_MB


def test_twenty_thousand_samples_take_no_more_memory_than_four_thousand(kit, tmp_path):
    """200 shards, more than the reader keeps tables and files of; one bad sample in each is told once a pass."""
    for shard in range(200):
        entries = kit.entries_of(20 * shard, 19, width=32, height=32)
        kit.write_tar(tmp_path / f"{shard:03d}.tar", [*entries, (f"bad{shard}.png", kit.coloured(1))])
    index_shards(tmp_path)
    config = kit.stream_config(tmp_path, lanes=96, window=32, quarantine=str(tmp_path / "q.jsonl"), resolution=32)
    samples = stream(config, kit.letters)
    marks = []
    for _ in range(5):
        for _ in islice(samples, 4000):
            pass
        gc.collect()
        marks.append(resident_mb())
    assert marks[-1] - marks[0] < 8, marks
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 200
