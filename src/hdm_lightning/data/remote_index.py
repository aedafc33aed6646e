"""An index of remote shards: each is fetched once, read, and forgotten."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hdm_lightning.data.index import PART_EVERY, load_index, write_index
from hdm_lightning.data.parallel import ordered_map
from hdm_lightning.data.records import Index, ShardRecord
from hdm_lightning.data.scanning import scan_shard
from hdm_lightning.data.sources import expanded
from hdm_lightning.data.storage import read_range
from hdm_lightning.errors import UserError

PART_BYTES = 64 << 20


def index_remote(
    patterns: Sequence[str],
    out: str | Path,
    *,
    jobs: int = 1,
    progress: Callable[[ShardRecord], None] | None = None,
) -> Index:
    """Index remote shards into a local file, to be named as `index` of their source.

    A call that was interrupted is gone on with by the next one for the same folder and file.

    Args:
        patterns: addresses of shards (`…/0000.tar`) or brace patterns of them, all below one folder.
        out: where the index is written; upload it beside the shards to have it found there.
        jobs: processes that fetch and read side by side.
        progress: called after each shard.

    Raises:
        UserError: an address is no shard, or cannot be read.
    """
    urls = [url for pattern in patterns for url in expanded(pattern)]
    folder, out = _common_folder(urls, patterns), Path(out)
    part = out.with_name(f".{out.stem}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}-part.json")
    known = {record.name: record for record in load_index(part).shards} if part.exists() else {}
    missing = [url for url in urls if _name(url) not in known]
    found = ordered_map(_scan, missing, processes=min(jobs, len(missing)))
    for done, record in enumerate(found, start=1):
        known[record.name] = record
        if progress is not None:
            progress(record)
        if done % PART_EVERY == 0:
            write_index(Index(folder, tuple(known.values())), part)
    index = Index(folder, tuple(known[_name(url)] for url in urls))
    write_index(index, out)
    part.unlink(missing_ok=True)
    return index


def _common_folder(urls: Sequence[str], patterns: Sequence[str]) -> str:
    folders = {url.rpartition("/")[0] for url in urls}
    if len(folders) != 1 or not all(url.endswith(".tar") for url in urls):
        raise UserError(
            "an index takes in remote shards below one folder, each named by its address",
            where=", ".join(patterns),
            hint="give a pattern such as https://host/folder/{0000..0099}.tar",
        )
    return folders.pop()


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _scan(url: str) -> ShardRecord:
    name = _name(url)
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / name).open("wb") as handle:
            try:
                while part := read_range(url, handle.tell(), handle.tell() + PART_BYTES):
                    handle.write(part)
                    if len(part) < PART_BYTES:
                        break
            except OSError as error:
                raise UserError(str(error), where=url, hint="check the address and the network") from error
        return scan_shard(Path(folder), name)
