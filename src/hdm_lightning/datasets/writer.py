"""Write samples into WebDataset tar shards: whole files or none, and the same bytes for the same samples."""

import io
import json
import tarfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from hdm_lightning.data.shard_files import find_shards
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import replacing

Field = bytes | str | Mapping[str, object]


def require_no_shards(folder: Path, *, but: Collection[str] = ()) -> None:
    """Raise UserError if `folder` already holds shards: old and new samples would be read together.

    Shards in subfolders count, as they do for its index, except those in the subfolders named in `but`.
    """
    names = find_shards(folder).names if folder.is_dir() else []
    if any(name.partition("/")[0] not in but for name in names):
        raise UserError(
            "the folder already holds .tar shards, and old and new samples would be read together",
            where=str(folder),
            hint="name another folder, or delete the shards in this one",
        )


Samples = Mapping[str, Mapping[str, Field]] | Iterable[tuple[str, Mapping[str, Field]]]


def write_shard(path: Path, samples: Samples, *, names_as_they_are: bool = False) -> None:
    """Write one whole shard to `path` atomically, in the order of the samples.

    Timestamps and owners are fixed, so equal samples give equal files.

    Args:
        path: file of the shard.
        samples: from key to fields: extensions ("webp", "txt", "json") and bytes, text or a mapping; pairs are
            written as they come, and need not fit into memory together.
        names_as_they_are: keys may contain folders and have any length, such as those read from other shards.

    Raises:
        ValueError: a key is empty, or contains "." or "/", at which a tar reader would split it.
        UserError: the disk is full.
    """
    kind = tarfile.GNU_FORMAT if names_as_they_are else tarfile.USTAR_FORMAT
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        tarfile.TarFile(fileobj=file, mode="w", format=kind) as tar,
    ):
        for key, fields in samples.items() if isinstance(samples, Mapping) else samples:
            if not names_as_they_are and (not key or "." in key or "/" in key):
                raise ValueError(f"key is {key!r}; expected a name without '.' and '/'")
            for extension, field in fields.items():
                content = _encode(field)
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mode, member.mtime = len(content), 0o644, 0
                tar.addfile(member, io.BytesIO(content))


def _encode(field: Field) -> bytes:
    if isinstance(field, bytes):
        return field
    if isinstance(field, str):
        return field.encode("utf-8", "replace")
    # A lone surrogate, as in the names of some files, becomes its JSON escape.
    return json.dumps(field, ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace")
