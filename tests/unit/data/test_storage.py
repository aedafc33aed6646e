"""Remote shards: ranges, servers that misbehave, copies with a limit."""

import contextlib
import errno
import http.server
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from hdm_lightning.data import reader, shard_cache, storage
from hdm_lightning.data.config import Source
from hdm_lightning.data.index import load_index
from hdm_lightning.data.loader import StreamLoader
from hdm_lightning.data.plan import Plan
from hdm_lightning.data.read_ahead import ReadAhead
from hdm_lightning.data.shard_cache import ShardCache
from hdm_lightning.data.storage import LocalFiles, is_local, read_range, read_whole, with_retries
from hdm_lightning.data.streaming import stream
from hdm_lightning.errors import UserError


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.folder`; `server.trouble(path, attempt)` names what goes wrong when a range is asked for again."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        with server.lock:
            request = (self.path, self.headers.get("Range"))
            server.requests.append(request)
            attempt = server.requests.count(request)
        trouble = "error" if request == server.unlucky else server.trouble(self.path, attempt)
        file = server.folder / self.path.lstrip("/")
        if trouble == "error":
            return self.send_error(503)
        if not file.is_file() or trouble == "gone":
            return self.send_error(404)
        body, status = file.read_bytes(), 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found and "no ranges" not in (trouble or ""):
            start, end = int(found[1]), int(found[2] or len(body)) + 1
            if start >= len(body):
                return self.send_error(416)
            body, status = body[start:end], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if "trickle" in (trouble or ""):
            return self.trickle(body)
        self.wfile.write(body[: len(body) // 2] if trouble == "cut" else body)
        if trouble == "stay":
            self.wfile.flush()
            self.server.leave.wait(30)
        if trouble == "cut":
            self.close_connection = True

    def trickle(self, body):
        """Never silent for long, and never done; whoever has heard enough hangs up."""
        with contextlib.suppress(ConnectionError):
            for byte in body[:400]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setattr(storage, "PAUSE_S", 0.01)
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    instance.folder, instance.requests, instance.lock = shards, [], threading.Lock()
    instance.trouble, instance.unlucky = lambda path, attempt: None, None
    instance.daemon_threads, instance.leave = True, threading.Event()
    instance.url = f"http://127.0.0.1:{instance.server_address[1]}"
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield instance
    instance.leave.set()
    instance.shutdown()
    instance.server_close()


def keys_of(samples):
    return [(sample.key, sample.weight) for sample in samples]


def test_ranges_are_the_bytes_of_the_file(server):
    data = (server.folder / "000.tar").read_bytes()
    url = f"{server.url}/000.tar"
    assert read_whole(url) == data
    for trouble in (None, "no ranges"):
        server.trouble = lambda path, attempt, trouble=trouble: trouble
        assert read_range(url, 512, 2000) == data[512:2000]
        assert read_range(url, len(data) - 10, len(data) + 10) == data[-10:]
        assert read_range(url, len(data) + 5, len(data) + 10) == b""


def test_a_read_that_dies_half_way_is_tried_again(server):
    data = (server.folder / "000.tar").read_bytes()
    for trouble in ("cut", "error"):
        server.requests.clear()
        server.trouble = lambda path, attempt, trouble=trouble: trouble if attempt < 4 else None
        assert read_range(f"{server.url}/000.tar", 0, 9000) == data[:9000]
        assert len(server.requests) == 4
    server.trouble = lambda path, attempt: "cut"
    with pytest.raises(OSError, match="gave up after 5 tries"):
        read_range(f"{server.url}/000.tar", 0, 9000)
    server.requests.clear()
    with pytest.raises(FileNotFoundError):
        read_range(f"{server.url}/nothing.tar", 0, 9)
    assert len(server.requests) == 1


def test_a_server_that_lets_bytes_trickle_is_given_up(server, monkeypatch):
    monkeypatch.setattr(storage, "TIMEOUT_S", 0.4)
    monkeypatch.setattr(storage, "TRIES", 2)
    for trouble in ("trickle", "trickle, no ranges"):
        server.trouble = lambda path, attempt, trouble=trouble: trouble
        begin = time.monotonic()
        with pytest.raises(OSError, match="gave up after 2 tries"):
            read_range(f"{server.url}/000.tar", 512, 2000)
        assert time.monotonic() - begin < 10


def test_a_server_that_does_not_hang_up_after_the_last_byte_holds_up_nobody(server):
    server.trouble = lambda path, attempt: "stay"
    data = (server.folder / "000.tar").read_bytes()
    begin = time.monotonic()
    assert read_range(f"{server.url}/000.tar", 512, 2000) == data[512:2000]
    assert read_whole(f"{server.url}/000.tar") == data
    assert time.monotonic() - begin < 10


def test_what_only_the_user_can_mend_is_told_at_once(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE_S", 100)
    with pytest.raises(UserError, match="cannot be opened") as caught:
        load_index("nothing-of-the-kind://bucket/shards")
    assert caught.value.where == "nothing-of-the-kind://bucket/shards/index.json" and "remote" in caught.value.mend


def test_a_stale_handle_of_a_network_file_is_opened_anew(shards, monkeypatch):
    files, path = LocalFiles(), str(shards / "000.tar")
    data, read = files.read(path, 0, 600), os.pread
    (stale,) = files._handles.values()

    def pread(handle, *arguments):
        if handle == stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(handle, *arguments)

    blocker = os.open(path, os.O_RDONLY)  # so that the next handle has another number
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(OSError, match="Stale"):
        files.read(path, 0, 600)
    spare = os.dup(blocker)
    assert files.read(path, 0, 600) == data
    os.close(blocker)
    os.close(spare)


def test_pauses_grow():
    times = []

    def fail():
        times.append(time.monotonic())
        raise ConnectionError("no")

    with pytest.raises(OSError, match="gave up after 4 tries: no"):
        with_retries(fail, tries=4, pause_s=0.02)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert pauses[0] >= 0.02 and pauses[1] >= 0.04 and pauses[2] >= 0.08


def test_a_remote_stream_is_the_local_one_whatever_the_server_does_in_between(kit, server):
    local = keys_of(stream(kit.stream_config(server.folder), kit.letters, start=20, stop=180))
    config = kit.stream_config(server.url)
    for trouble in (
        lambda path, attempt: None,
        lambda path, attempt: "cut" if attempt % 2 else None,
        lambda path, attempt: "error" if attempt % 2 else None,
        lambda path, attempt: "no ranges",
    ):
        server.trouble = trouble
        assert keys_of(stream(config, kit.letters, start=20, stop=180)) == local
    pattern = kit.stream_config(f"{server.url}/{{000..004}}.tar")
    assert keys_of(stream(pattern, kit.letters, start=20, stop=180)) == local


def test_a_dead_remote_shard_is_skipped_without_waiting_for_each_sample(kit, server):
    server.trouble = lambda path, attempt: "error" if "002" in path else "gone" if "003" in path else None
    samples = list(stream(kit.stream_config(server.url), kit.letters, stop=150))
    faults = Counter(sample.fault.split(":")[0] for sample in samples)
    assert faults == {"": 89, "unreadable shard": 60, "missing shard": 1}
    assert sum("002" in path for path, _ in server.requests) <= 5 * (reader.STRIKES + reader.THREADS)


def test_a_read_that_is_given_up_costs_its_own_samples_alone(kit, server):
    """A range of the largest shard never comes; the other windows of that shard do."""
    config = kit.stream_config(server.url)
    whole = keys_of(stream(config, kit.letters, stop=150))
    ranges = [asked for path, asked in server.requests if "002" in path]
    assert len(ranges) > 10
    server.unlucky = ("/002.tar", ranges[4])
    samples = list(stream(config, kit.letters, stop=150))
    places = [Plan(config).locate(sample.index) for sample in samples if sample.fault]
    assert {sample.fault.split(":")[0] for sample in samples} == {"", "unreadable shard"}
    assert len({(place.window.lane, place.window.number) for place in places}) == 1
    assert 1 <= len(places) <= config.window
    assert [key for key, sample in zip(whole, samples, strict=True) if not sample.fault] == [
        key for key in keys_of(samples) if key[1]
    ]


def test_a_dead_shard_is_tried_again_after_a_while(kit, server, monkeypatch):
    """It died in the first pass and is well in the second."""
    monkeypatch.setattr(reader, "RETRY_AFTER_S", 0.0)
    dead = {"now": True}
    server.trouble = lambda path, attempt: "error" if "002" in path and dead["now"] else None
    faults = []
    for sample in stream(kit.stream_config(server.url), kit.letters, stop=300):
        dead["now"] = sample.index < 149
        faults.append(sample.fault)
    assert sum(map(bool, faults[:150])) == 60
    assert sum(map(bool, faults[-100:])) == 0


def test_resuming_reads_at_most_a_window_of_each_lane_again(kit, server):
    lanes, window = 12, 4
    config = kit.stream_config(server.url)
    start = 77
    next(iter(stream(config, kit.letters, start=start)))
    server.requests.clear()
    plan = Plan(config)
    samples = stream(config, kit.letters, start=start, plan=plan)
    server.requests.clear()
    list(zip(range(lanes), samples, strict=False))  # one sample of each lane: every lane has read its window
    wanted = 0
    for _, asked in server.requests:
        first, last = map(int, re.findall(r"\d+", asked))
        wanted += last + 1 - first
    largest = max(int(shard.table().size.max()) for part in plan.parts for shard in part.shards)
    # The rest of the present window and the one that is read ahead.
    assert 0 < wanted <= 2 * lanes * window * largest
    assert all(asked is not None for path, asked in server.requests if path.endswith(".tar"))


def test_workers_read_remote_shards(kit, server):
    server.trouble = lambda path, attempt: "cut" if attempt % 3 else None
    config = kit.stream_config(server.url, workers=2)
    local = [sample.key for sample in stream(kit.stream_config(server.folder), kit.letters, stop=90)]
    loader = iter(StreamLoader(config, Plan(config), kit.letters, batch_size=30))
    assert [key for _ in range(3) for key in next(loader)["keys"]] == local


def test_an_index_may_lie_elsewhere_and_a_missing_one_is_named(kit, server, tmp_path):
    (tmp_path / "mine.json").write_bytes((server.folder / "index.json").read_bytes())
    source = Source((f"{server.url}/{{000..004}}.tar",), index=str(tmp_path / "mine.json"))
    assert Plan(kit.stream_config(sources=(source,))).samples == 150
    with pytest.raises(UserError, match="no index") as caught:
        load_index(f"{server.url}/nowhere")
    assert f"hdm-shards index '{server.url}/nowhere/{{0000..0099}}.tar' --out" in caught.value.mend
    with pytest.raises(UserError, match="no index") as caught:
        load_index(f"{server.url}/other.json")
    assert "`index` of the source" in caught.value.mend
    server.trouble = lambda path, attempt: "error"
    with pytest.raises(UserError, match=r"cannot be read .*503"):
        load_index(server.url)


def test_fsspec_addresses(kit, shards):
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in shards.iterdir():
        memory.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    config = kit.stream_config("memory://bucket")
    local = keys_of(stream(kit.stream_config(shards), kit.letters, stop=150))
    assert keys_of(stream(config, kit.letters, stop=150)) == local
    memory.rm("/bucket/002.tar")
    faults = Counter(sample.fault for sample in stream(config, kit.letters, stop=150))
    assert faults == {"": 90, "missing shard": 60}


def test_pipes_of_webdataset(kit, shards):
    data = (shards / "002.tar").read_bytes()
    assert read_range(f"pipe:cat {shards}/002.tar", 1000, 5000) == data[1000:5000]
    config = kit.stream_config(sources=(Source((f"pipe:cat {shards}/002.tar",), index=str(shards)),))
    samples = list(stream(config, kit.letters, stop=60))
    assert sum(sample.weight for sample in samples) == 60


def test_what_is_local():
    assert is_local("/a/b.tar") and is_local("b.tar") and is_local("C:/x")
    assert not is_local("s3://a/b.tar") and not is_local("pipe:cat x")


def test_local_files_keep_few_open(shards):
    files = LocalFiles(limit=2)
    for _ in range(3):
        for name in ("000.tar", "001.tar", "002.tar", "004.tar"):
            assert files.read(str(shards / name), 0, 600) == (shards / name).read_bytes()[:600]
            assert len(files._handles) <= 2
    files.close()
    with pytest.raises(FileNotFoundError):
        files.read(str(shards / "none.tar"), 0, 1)


def test_the_cache_reads_each_shard_once_and_keeps_to_its_limit(kit, server, tmp_path):
    config = kit.stream_config(server.url, cache_dir=str(tmp_path / "cache"))
    local = keys_of(stream(kit.stream_config(server.folder), kit.letters, stop=300))
    assert keys_of(stream(config, kit.letters, stop=300)) == local
    fetched = Counter(path for path, _ in server.requests if path.endswith(".tar"))
    assert fetched == {f"/{n:03d}.tar": 1 for n in range(5)}
    server.trouble = lambda path, attempt: "gone" if path.endswith(".tar") else None
    assert keys_of(stream(config, kit.letters, stop=150)) == local[:150]
    copies = sorted((tmp_path / "cache").glob("*.tar"))
    assert sorted(path.read_bytes() for path in copies) == sorted(p.read_bytes() for p in server.folder.glob("*.tar"))
    assert not list((tmp_path / "cache").glob("*.part*"))


def test_old_copies_make_room_for_new_ones(server, tmp_path):
    records = load_index(server.folder).shards
    sizes = [record.bytes for record in records]
    cache = ShardCache(str(tmp_path), (sizes[0] + sizes[2]) / 1e9)
    for number in (0, 1, 3):
        assert cache.path(f"{server.url}/{records[number].name}", records[number])
        time.sleep(0.01)
    cache.path(f"{server.url}/000.tar", records[0])  # used again: now the youngest
    cache.path(f"{server.url}/002.tar", records[2])
    held = sorted(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert held == sorted([sizes[0], sizes[2]])
    with pytest.raises(UserError, match="cannot be made") as caught:
        ShardCache(str(next(tmp_path.glob("*.tar")) / "below a file"), 1.0)
    assert caught.value.where == "data.cache_dir"
    tiny = ShardCache(str(tmp_path), 1e-6)
    assert tiny.path(f"{server.url}/000.tar", records[0]) is None
    data = (server.folder / "000.tar").read_bytes()
    assert tiny.read(f"{server.url}/000.tar", records[0], 100, 900) == data[100:900]


def test_a_copy_that_goes_while_it_is_wanted_is_read_from_afar(server, tmp_path, monkeypatch):
    record, url = load_index(server.folder).shards[0], f"{server.url}/000.tar"
    cache, data = ShardCache(str(tmp_path), 1.0), (server.folder / "000.tar").read_bytes()
    path = cache.path

    def gone(*arguments):
        copy = path(*arguments)
        os.unlink(copy)
        return copy

    monkeypatch.setattr(cache, "path", gone)
    assert cache.read(url, record, 512, 4000) == data[512:4000]


def test_what_killed_processes_left_is_taken_away(server, tmp_path):
    record, url = load_index(server.folder).shards[0], f"{server.url}/000.tar"
    for name, age in (("old.part1", 7200), ("young.part2", 10)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    ShardCache(str(tmp_path), 1.0).path(url, record)
    assert [path.name for path in tmp_path.glob("*.part*")] == ["young.part2"]


def test_copies_under_way_count_and_files_that_go_disturb_nobody(server, tmp_path):
    """Another process is fetching: what it will take is taken, and its file may change names at any time."""
    records = load_index(server.folder).shards
    cache, sizes = ShardCache(str(tmp_path), sum(record.bytes for record in records) / 1e9), []
    assert cache.path(f"{server.url}/000.tar", records[0])
    (tmp_path / "renamed.part7").symlink_to(tmp_path / "no longer here")
    with (tmp_path / "other.part8").open("wb") as other:
        other.truncate(cache.limit - records[1].bytes)
    assert cache.path(f"{server.url}/002.tar", records[2]) is None
    assert cache.read(f"{server.url}/002.tar", records[2], 0, 512) == (server.folder / "002.tar").read_bytes()[:512]
    assert len(list(tmp_path.glob("*.tar"))) == 1  # nothing was given up for a copy that does not fit all the same
    fetch = shard_cache._fetch

    def watched(*arguments):
        sizes.extend(path.stat().st_size for path in tmp_path.glob("*.part*") if path.exists())
        fetch(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_cache, "_fetch", watched)
        assert cache.path(f"{server.url}/001.tar", records[1])
    assert sum(sizes) == cache.limit  # room is taken before the first byte comes


def test_copies_that_differ_from_the_index_are_not_kept(kit, server, tmp_path, monkeypatch):
    from dataclasses import replace

    record = load_index(server.folder).shards[0]
    monkeypatch.setattr(shard_cache, "PART_BYTES", 10_000)
    cache = ShardCache(str(tmp_path), 1.0)
    with pytest.raises(OSError, match="wrong checksum"):
        cache.path(f"{server.url}/000.tar", replace(record, sha256="0" * 64))
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.part*"))
    copy = cache.path(f"{server.url}/000.tar", record)
    with open(copy, "rb") as handle:
        assert handle.read() == (server.folder / "000.tar").read_bytes()


def test_a_silent_server_does_not_hold_up_the_end_of_the_process():
    code = """
from hdm_lightning.data.read_ahead import ReadAhead
import time
ahead = ReadAhead(2)
print(ahead.submit(lambda: 6 * 7).result())
ahead.submit(lambda: time.sleep(60))
"""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.stdout == "42\n" and time.monotonic() - begin < 45


def test_errors_of_threads_reach_whoever_asks():
    with pytest.raises(ZeroDivisionError):
        ReadAhead(1).submit(lambda: 1 // 0).result()
