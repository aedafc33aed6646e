"""Remote shards: ranges, servers that misbehave, copies with a limit."""

import errno
import gc
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from typing import ClassVar

import pytest

from hdm_lightning.data import reader, scanning, shard_bytes
from hdm_lightning.data.index import load_index
from hdm_lightning.data.loader import StreamLoader, ValidationLoader
from hdm_lightning.data.reader import LocalFiles, ReadAhead
from hdm_lightning.data.rules import Source
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import stream
from hdm_lightning.data.shard_bytes import RefusedRedirect, is_local, read_range, read_whole, with_retries
from hdm_lightning.errors import UserError


def test_ranges_are_the_bytes_of_the_file(server):
    data = (server.folder / "000.tar").read_bytes()
    url = f"{server.url}/000.tar"
    assert read_whole(url, 1 << 30) == data
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
    monkeypatch.setattr(shard_bytes, "TIMEOUT_S", 0.4)
    monkeypatch.setattr(shard_bytes, "TRIES", 2)
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
    assert read_whole(f"{server.url}/000.tar", 1 << 30) == data
    assert time.monotonic() - begin < 10


def test_what_only_the_user_can_hint_is_told_at_once(monkeypatch):
    monkeypatch.setattr(shard_bytes, "PAUSE_S", 100)
    with pytest.raises(UserError, match="cannot be opened") as caught:
        load_index("nothing-of-the-kind://bucket/shards")
    assert caught.value.where == "nothing-of-the-kind://bucket/shards/index.json" and "remote" in caught.value.hint


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


def test_files_that_are_let_go_are_closed_and_open_ones_end_without_a_trace(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    files = LocalFiles()
    assert files.read(str(tmp_path / "a"), 1, 3) == b"bc"
    (handle,) = files._handles.values()
    del files
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)
    program = f"from hdm_lightning.data.reader import LocalFiles as L\nl = L(); l.read({str(tmp_path / 'a')!r}, 0, 1)"
    program += "\nimport os; os.kept = l"  # alive until the module that closes files is torn down
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_pauses_grow(monkeypatch):
    monkeypatch.setattr(shard_bytes, "PAUSE_S", 0.02)
    times = []

    def fail():
        times.append(time.monotonic())
        raise ConnectionError("no")

    with pytest.raises(OSError, match="gave up after 4 tries: no"):
        with_retries(fail, tries=4)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert pauses[0] >= 0.02 and pauses[1] >= 0.04 and pauses[2] >= 0.08


def test_a_remote_stream_is_the_local_one_whatever_the_server_does_in_between(kit, server):
    local = kit.keys_of(stream(kit.stream_config(server.folder), kit.letters, start=20, stop=180))
    config = kit.stream_config(server.url)
    for trouble in (
        lambda path, attempt: None,
        lambda path, attempt: "cut" if attempt % 2 else None,
        lambda path, attempt: "error" if attempt % 2 else None,
        lambda path, attempt: "no ranges",
    ):
        server.trouble = trouble
        assert kit.keys_of(stream(config, kit.letters, start=20, stop=180)) == local
    pattern = kit.stream_config(f"{server.url}/{{000..004}}.tar")
    assert kit.keys_of(stream(pattern, kit.letters, start=20, stop=180)) == local


def test_a_dead_remote_shard_is_skipped_without_waiting_for_each_sample(kit, server):
    server.trouble = lambda path, attempt: "error" if "002" in path else "gone" if "003" in path else None
    samples = list(stream(kit.stream_config(server.url), kit.letters, stop=150))
    faults = Counter(sample.fault.split(":")[0] for sample in samples)
    assert faults == {"": 89, "unreadable shard": 60, "missing shard": 1}
    assert sum("002" in path for path, _ in server.requests) <= 5 * (reader.STRIKES + reader.THREADS)


def test_a_read_that_is_given_up_costs_its_own_samples_alone(kit, server):
    """A range of the largest shard never comes; the other windows of that shard do."""
    config = kit.stream_config(server.url)
    whole = kit.keys_of(stream(config, kit.letters, stop=150))
    ranges = [asked for path, asked in server.requests if "002" in path]
    assert len(ranges) > 10
    server.unlucky = ("/002.tar", ranges[4])
    samples = list(stream(config, kit.letters, stop=150))
    places = [Plan(config).locate(sample.index) for sample in samples if sample.fault]
    assert {sample.fault.split(":")[0] for sample in samples} == {"", "unreadable shard"}
    assert len({(place.window.lane, place.window.number) for place in places}) == 1
    assert 1 <= len(places) <= config.window
    assert [key for key, sample in zip(whole, samples, strict=True) if not sample.fault] == [
        key for key in kit.keys_of(samples) if key[1]
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


@pytest.mark.parametrize("samples", [12, 30])
def test_a_validation_reads_its_own_samples_and_none_ahead(kit, server, samples):
    """12 lanes with windows of 4: samples of a lane that lie in a window not read to its end are not asked for."""
    config, far = kit.stream_config(server.folder), kit.stream_config(server.url)
    plan, shape = Plan(far), {"samples": samples, "batch_size": 6}
    near = [key for batch in ValidationLoader(config, Plan(config), kit.letters, **shape) for key in batch["keys"]]
    server.requests.clear()
    assert [key for batch in ValidationLoader(far, plan, kit.letters, **shape) for key in batch["keys"]] == near
    asked = [(path, *map(int, re.findall(r"\d+", span))) for path, span in server.requests if path.endswith(".tar")]
    largest = max(int(shard.table().size.max()) for part in plan.parts for shard in part.shards)
    places = -(-samples // 12)
    assert sum(last + 1 - first for _, first, last in asked) <= (12 if places == 1 else 12 * 4) * largest
    assert len(asked) == len(set(asked)) and len(near) == samples


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
    assert f"hdm-shards index '{server.url}/nowhere/{{0000..0099}}.tar' --out" in caught.value.hint
    with pytest.raises(UserError, match="no index") as caught:
        load_index(f"{server.url}/other.json")
    assert "`index` of the source" in caught.value.hint
    server.trouble = lambda path, attempt: "error"
    with pytest.raises(UserError, match=r"cannot be read .*503"):
        load_index(server.url)


def test_fsspec_addresses(kit, shards):
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in shards.iterdir():
        memory.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    config = kit.stream_config("memory://bucket")
    local = kit.keys_of(stream(kit.stream_config(shards), kit.letters, stop=150))
    assert kit.keys_of(stream(config, kit.letters, stop=150)) == local
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


def test_local_files_keep_few_open(shards, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_FILES", 2)
    files = LocalFiles()
    for _ in range(3):
        for name in ("000.tar", "001.tar", "002.tar", "004.tar"):
            assert files.read(str(shards / name), 0, 600) == (shards / name).read_bytes()[:600]
            assert len(files._handles) <= 2
    files.close()
    with pytest.raises(FileNotFoundError):
        files.read(str(shards / "none.tar"), 0, 1)


def test_a_silent_server_does_not_hold_up_the_end_of_the_process():
    code = """
from hdm_lightning.data.reader import LocalFiles, ReadAhead
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


def test_calls_that_wait_have_no_thread_and_begin_in_their_order():
    ahead, go, begun = ReadAhead(1), threading.Event(), []

    def call(number):
        begun.append(number)
        go.wait(20)

    before = threading.active_count()
    futures = [ahead.submit(partial(call, number)) for number in range(40)]
    assert threading.active_count() <= before + 1
    go.set()
    assert [future.result(20) for future in futures] == [None] * 40 and begun == list(range(40))
    assert ahead.submit(lambda: 7).result(20) == 7  # also after the thread has ended


def test_ranges_that_a_proxy_shortens_are_completed_and_shifted_ones_refused(kit, server):
    data, url = (server.folder / "000.tar").read_bytes(), f"{server.url}/000.tar"
    server.trouble = lambda path, attempt: "capped"
    assert read_range(url, 512, 20_000) == data[512:20_000] and len(server.requests) == 7
    assert read_range(url, len(data) - 10, len(data) + 10) == data[-10:]
    local = kit.keys_of(stream(kit.stream_config(server.folder), kit.letters, stop=60))
    assert kit.keys_of(stream(kit.stream_config(server.url), kit.letters, stop=60)) == local
    server.trouble = lambda path, attempt: "shifted" if attempt < 3 else None
    assert read_range(url, 1024, 1500) == data[1024:1500]


def test_redirects_to_other_protocols_are_not_followed(server):
    server.trouble = lambda path, attempt: "elsewhere"
    with pytest.raises(RefusedRedirect, match="redirects to ftp:"):
        read_range(f"{server.url}/000.tar", 0, 100)


def test_a_range_without_a_length_takes_no_more_than_was_asked_for():
    class Endless:
        """A reply that never ends."""

        status, url, headers, given = 206, "http://x", {}, 0

        def read1(self, count):
            self.given += count
            return bytes(count)

    reply = Endless()
    assert shard_bytes._body(reply, 100, 5100) == (bytes(5000), None) and reply.given == 5000


@pytest.mark.parametrize(
    ("asked", "whole"), [((0, 5000), 700), ((512, 5000), 700), ((600, None), 700), ((900, 5000), 700)]
)
def test_nothing_is_taken_behind_the_end_that_a_server_itself_has_told(asked, whole):
    class GoesOn:
        """A reply that says where its file ends, and does not end there."""

        status, url, given = 206, "http://x", 0
        headers: ClassVar = {"Content-Range": f"bytes {asked[0]}-{whole}/{whole}"}

        def read1(self, count):
            self.given += count
            return bytes(count)

    reply, left = GoesOn(), max(0, whole - asked[0])
    assert shard_bytes._body(reply, *asked) == (bytes(left), whole) and reply.given == left


def test_a_server_without_end_cannot_fill_the_disk_while_it_is_indexed(server, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(scanning, "FETCHED_BYTES", 1000)
    monkeypatch.setattr(scanning, "MOST_SHARD_BYTES", 5000)
    monkeypatch.setattr(scanning, "read_range", lambda url, start, end, see: asked.append(start) or bytes(end - start))
    with pytest.raises(UserError, match="more than") as caught:
        scanning.index_remote([f"{server.url}/000.tar"], tmp_path / "index.json")
    assert caught.value.where == f"{server.url}/000.tar" and asked == [0, 1000, 2000, 3000, 4000, 5000]


def test_threads_that_read_ahead_end_with_their_loader(kit, server):
    before = threading.active_count()
    for _ in range(3):
        samples = stream(kit.stream_config(server.url), kit.letters)
        assert next(samples).weight == 1
        samples.close()
    deadline = time.monotonic() + 10
    while [thread for thread in threading.enumerate() if thread.name == "read-ahead"]:
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.05)
    assert threading.active_count() <= before + 5  # the server has threads of its own
