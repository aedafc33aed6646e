"""Copies of remote shards: each made once, within a limit, and gone without harm."""

import os
import time
from collections import Counter

import pytest

from hdm_lightning.data import shard_cache
from hdm_lightning.data.index import load_index
from hdm_lightning.data.samples import stream
from hdm_lightning.data.shard_cache import ShardCache
from hdm_lightning.errors import UserError


def content(record):
    """Size and checksum of a shard."""
    return record.bytes, record.sha256


def test_the_cache_reads_each_shard_once_and_keeps_to_its_limit(kit, server, tmp_path):
    config = kit.stream_config(server.url, cache_dir=str(tmp_path / "cache"))
    local = kit.keys_of(stream(kit.stream_config(server.folder), kit.letters, stop=300))
    assert kit.keys_of(stream(config, kit.letters, stop=300)) == local
    fetched = Counter(path for path, _ in server.requests if path.endswith(".tar"))
    assert fetched == {f"/{n:03d}.tar": 1 for n in range(5)}
    server.trouble = lambda path, attempt: "gone" if path.endswith(".tar") else None
    assert kit.keys_of(stream(config, kit.letters, stop=150)) == local[:150]
    copies = sorted((tmp_path / "cache").glob("*.tar"))
    assert sorted(path.read_bytes() for path in copies) == sorted(p.read_bytes() for p in server.folder.glob("*.tar"))
    assert not list((tmp_path / "cache").glob("*.part*"))


def test_old_copies_make_room_for_new_ones(server, tmp_path):
    records = load_index(server.folder).shards
    sizes = [record.bytes for record in records]
    cache = ShardCache(str(tmp_path), (sizes[0] + sizes[2]) / 1e9)
    for number in (0, 1, 3):
        assert cache.path(f"{server.url}/{records[number].name}", *content(records[number]))
        time.sleep(0.01)
    cache.path(f"{server.url}/000.tar", *content(records[0]))  # used again: now the youngest
    cache.path(f"{server.url}/002.tar", *content(records[2]))
    held = sorted(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert held == sorted([sizes[0], sizes[2]])
    with pytest.raises(UserError, match="cannot be created") as caught:
        ShardCache(str(next(tmp_path.glob("*.tar")) / "below a file"), 1.0)
    assert caught.value.where == "data.cache_dir"
    tiny = ShardCache(str(tmp_path), 1e-6)
    assert tiny.path(f"{server.url}/000.tar", *content(records[0])) is None
    data = (server.folder / "000.tar").read_bytes()
    assert tiny.read(f"{server.url}/000.tar", *content(records[0]), 100, 900) == data[100:900]


def test_a_copy_that_goes_while_it_is_wanted_is_read_from_afar(server, tmp_path, monkeypatch):
    record, url = load_index(server.folder).shards[0], f"{server.url}/000.tar"
    cache, data = ShardCache(str(tmp_path), 1.0), (server.folder / "000.tar").read_bytes()
    path = cache.path

    def gone(*arguments):
        copy = path(*arguments)
        os.unlink(copy)
        return copy

    monkeypatch.setattr(cache, "path", gone)
    assert cache.read(url, *content(record), 512, 4000) == data[512:4000]


def test_what_killed_processes_left_is_taken_away(server, tmp_path):
    record, url = load_index(server.folder).shards[0], f"{server.url}/000.tar"
    for name, age in (("old.part1", 7200), ("young.part2", 10)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    ShardCache(str(tmp_path), 1.0).path(url, *content(record))
    assert [path.name for path in tmp_path.glob("*.part*")] == ["young.part2"]


def test_copies_under_way_count_and_files_that_go_disturb_nobody(server, tmp_path):
    """Another process is fetching: what it will take is taken, and its file may change names at any time."""
    records = load_index(server.folder).shards
    cache, sizes = ShardCache(str(tmp_path), sum(record.bytes for record in records) / 1e9), []
    assert cache.path(f"{server.url}/000.tar", *content(records[0]))
    (tmp_path / "renamed.part7").symlink_to(tmp_path / "no longer here")
    with (tmp_path / "other.part8").open("wb") as other:
        other.truncate(cache.limit - records[1].bytes)
    assert cache.path(f"{server.url}/002.tar", *content(records[2])) is None
    assert (
        cache.read(f"{server.url}/002.tar", *content(records[2]), 0, 512)
        == (server.folder / "002.tar").read_bytes()[:512]
    )
    assert len(list(tmp_path.glob("*.tar"))) == 1  # nothing was given up for a copy that does not fit all the same
    fetch = shard_cache._fetch

    def watched(*arguments):
        sizes.extend(path.stat().st_size for path in tmp_path.glob("*.part*") if path.exists())
        fetch(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_cache, "_fetch", watched)
        assert cache.path(f"{server.url}/001.tar", *content(records[1]))
    assert sum(sizes) == cache.limit  # room is taken before the first byte comes


def test_copies_that_differ_from_the_index_are_not_kept(kit, server, tmp_path, monkeypatch):
    record = load_index(server.folder).shards[0]
    monkeypatch.setattr(shard_cache, "COPIED_BYTES", 10_000)
    cache = ShardCache(str(tmp_path), 1.0)
    with pytest.raises(OSError, match="wrong checksum"):
        cache.path(f"{server.url}/000.tar", record.bytes, "0" * 64)
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.part*"))
    copy = cache.path(f"{server.url}/000.tar", *content(record))
    with open(copy, "rb") as handle:
        assert handle.read() == (server.folder / "000.tar").read_bytes()
