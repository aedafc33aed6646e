"""What shards hold, read by their index, and hashes of their files."""

import hashlib
from pathlib import Path

from hdm_lightning.data.sample_table import RawSample
from hdm_lightning.datasets.shard_work import samples_of, shards_in


def samples_in(folder: str | Path) -> list[RawSample]:
    """Every usable sample of a set, in order; one that cannot be read fails."""
    found = [sample for shard in shards_in(str(folder)) for _, sample in samples_of(shard)]
    assert all(isinstance(sample, RawSample) for sample in found)
    return found  # type: ignore[return-value]


def members_in(folder: str | Path) -> dict[str, dict[str, bytes]]:
    """The members of every usable sample by its key."""
    return {sample.key: sample.members for sample in samples_in(folder)}


def digests(folder: Path) -> dict[str, str]:
    """A hash of every shard directly in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.tar"))}


def rejections(out):
    """What a builder left out of a set: reasons by name."""
    return dict(line.split("\t") for line in (out / "rejected.tsv").read_text().splitlines())
