"""Writes samples into WebDataset tar shards: whole files or none, and the same bytes for the same samples."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from hdm_lightning.data.scanning import index_shards
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import Replacement

Field = bytes | str | Mapping[str, object]


class ShardWriter:
    """Writes `folder/prefix-00000.tar`, `prefix-00001.tar`, … and, on leaving the context, their index.

    A shard grows in a temporary file beside its place and takes its name, after an fsync, once it is full; a
    run that is killed leaves whole shards only. Time stamps and owners are fixed, so that equal samples give
    equal files.

    Args:
        folder: made when missing; it must hold no `.tar` yet.
        samples_per_shard: samples in each shard but the last.
        prefix: beginning of the shards' names.

    Raises:
        UserError: on entering, when the folder already holds shards.
        ValueError: for a count below one.
    """

    def __init__(self, folder: str | Path, *, samples_per_shard: int = 1000, prefix: str = "shard") -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; expected 1 or more")
        self.folder, self.samples_per_shard, self.prefix = Path(folder), samples_per_shard, prefix
        self.samples_written = 0
        self._shard: _Shard | None = None

    def __enter__(self) -> Self:
        require_no_shards(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            shard, self._shard = self._shard, None
            shard.discard() if kind else shard.finish()
        if kind is None:
            index_shards(self.folder)

    def write(self, key: str, fields: Mapping[str, Field]) -> None:
        """Append one sample: `fields` maps extensions ("webp", "txt", "json") to bytes, text or a mapping.

        Raises:
            ValueError: for a key that a tar reader would split ("." or "/" in it) or that is empty.
        """
        if self._shard is None:
            number = self.samples_written // self.samples_per_shard
            self._shard = _Shard(self.folder / f"{self.prefix}-{number:05d}.tar")
        self._shard.add(key, fields)
        self.samples_written += 1
        if self.samples_written % self.samples_per_shard == 0:
            shard, self._shard = self._shard, None
            shard.finish()


def require_no_shards(folder: Path) -> None:
    """Raise UserError when `folder` already holds shards: old and new samples would be read together."""
    if any(folder.glob("*.tar")):
        raise UserError(
            "the folder already holds .tar shards, and old and new samples would be read together",
            where=str(folder),
            hint="name another folder, or delete the shards in this one",
        )


def write_shard(path: Path, samples: Mapping[str, Mapping[str, Field]]) -> None:
    """Write one whole shard at `path` atomically, from key to fields, in the mapping's order."""
    shard = _Shard(path)
    try:
        for key, fields in samples.items():
            shard.add(key, fields)
    except BaseException:
        shard.discard()
        raise
    shard.finish()


class _Shard:
    """One tar under construction at a temporary name."""

    def __init__(self, path: Path) -> None:
        self.new = Replacement(path)
        self.file: IO[bytes] = self.new.temporary.open("wb")
        self.tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, key: str, fields: Mapping[str, Field]) -> None:
        if not key or "." in key or "/" in key:
            raise ValueError(f"key is {key!r}; expected a name without '.' and '/'")
        for extension, field in fields.items():
            content = _encode(field)
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode, member.mtime = len(content), 0o644, 0
            self.tar.addfile(member, io.BytesIO(content))

    def finish(self) -> None:
        self.tar.close()
        self.file.close()
        self.new.commit()

    def discard(self) -> None:
        self.file.close()
        self.new.discard()


def _encode(field: Field) -> bytes:
    if isinstance(field, bytes):
        return field
    if isinstance(field, str):
        return field.encode("utf-8", "replace")
    # Half a surrogate pair, as the name of a file can hold, becomes the escape that JSON has for it.
    return json.dumps(field, ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace")
