"""An index of remote shards: each is fetched once, read, and forgotten."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from braceexpand import braceexpand

from hdm_lightning.data.index import write_index
from hdm_lightning.data.records import Index, ShardRecord
from hdm_lightning.data.scanning import scan_shard
from hdm_lightning.data.storage import read_range
from hdm_lightning.errors import UserError

PART_BYTES = 64 << 20


def index_remote(
    patterns: Sequence[str], out: str | Path, *, progress: Callable[[ShardRecord], None] | None = None
) -> Index:
    """Index remote shards into a local file, to be named as `index` of their source.

    Args:
        patterns: addresses of shards (`…/0000.tar`) or brace patterns of them, all below one folder.
        out: where the index is written; upload it beside the shards to have it found there.
        progress: called after each shard.

    Raises:
        UserError: an address is no shard, or cannot be read.
    """
    urls = [url for pattern in patterns for url in braceexpand(pattern)]
    folders = {url.rpartition("/")[0] for url in urls}
    if len(folders) != 1 or not all(url.endswith(".tar") for url in urls):
        raise UserError(
            "an index takes in remote shards below one folder, each named by its address",
            where=", ".join(patterns),
            mend="give a pattern such as https://host/folder/{0000..0099}.tar",
        )
    records = []
    for url in urls:
        records.append(_scan(url))
        if progress is not None:
            progress(records[-1])
    index = Index(folders.pop(), tuple(records))
    write_index(index, Path(out))
    return index


def _scan(url: str) -> ShardRecord:
    name = url.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / name).open("wb") as handle:
            try:
                while part := read_range(url, handle.tell(), handle.tell() + PART_BYTES):
                    handle.write(part)
                    if len(part) < PART_BYTES:
                        break
            except OSError as error:
                raise UserError(str(error), where=url, mend="check the address and the network") from error
        return scan_shard(Path(folder), name)
