"""Shards for tests, written sample by sample by what the builders write with."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hdm_lightning.data.scanning import index_shards
from hdm_lightning.datasets.writer import write_shard


class ShardWriter:
    """Collects samples, and on leaving the context writes `shard-00000.tar`, `shard-00001.tar`, … and their index."""

    def __init__(self, folder: str | Path, *, samples_per_shard: int = 1000) -> None:
        self.folder, self.samples_per_shard = Path(folder), samples_per_shard
        self.samples: list[tuple[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def write(self, key: str, fields: Any) -> None:
        self.samples.append((key, fields))

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            for number, first in enumerate(range(0, len(self.samples), self.samples_per_shard)):
                samples = dict(self.samples[first : first + self.samples_per_shard])
                write_shard(self.folder / f"shard-{number:05d}.tar", samples)
            index_shards(self.folder)
