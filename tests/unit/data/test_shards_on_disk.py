"""Data that are replaced behind their index: told before a training begins, or when a server is first asked."""

import json
import os
import random
import shutil

import pytest

from hdm_lightning.cli.shards import main
from hdm_lightning.data.index import INDEX_NAME, load_index
from hdm_lightning.data.rules import Source
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_remote, index_shards
from hdm_lightning.data.shard_bytes import read_whole
from hdm_lightning.data.shards_on_disk import changes, notes, require_unchanged
from hdm_lightning.errors import UserError


def plan_of(kit, *folders):
    return Plan(kit.stream_config(*folders))


def set_time(path, seconds):
    os.utime(path, ns=(0, seconds * 1_000_000_000))


@pytest.fixture
def folder(kit, tmp_path):
    """Four shards of six samples, changed at known times."""
    root = kit.write_shards(tmp_path / "set", [6] * 4)
    for number in range(4):
        set_time(root / f"{number:03d}.tar", 1000 + number)
    index_shards(root)
    return root


def longer(path, lot, kit):
    path.write_bytes(path.read_bytes() + bytes(512 * lot.randint(1, 9)))


def shorter(path, lot, kit):
    os.truncate(path, path.stat().st_size - 512 * lot.randint(1, 9))


def other_samples(path, lot, kit):
    size = path.stat().st_size
    kit.write_tar(path, kit.entries_of(100 + 10 * lot.randrange(50), 6))
    data = path.read_bytes()[:size]
    path.write_bytes(data + bytes(size - len(data)))


def gone(path, lot, kit):
    path.unlink()


@pytest.mark.parametrize("change", [longer, shorter, other_samples, gone])
def test_a_replaced_shard_is_named_and_following_the_hint_mends_it(folder, kit, change, capsys):
    lot = random.Random(change.__name__)
    path = folder / f"{lot.randrange(4):03d}.tar"
    assert not changes([plan_of(kit, folder)])
    change(path, lot, kit)
    with pytest.raises(UserError) as caught:
        require_unchanged([plan_of(kit, folder)])
    assert caught.value.where == str(path)
    (note,) = notes([plan_of(kit, folder)])  # what a run that has begun says
    assert str(path) in note and caught.value.hint in note
    command, *arguments = caught.value.hint.split()
    assert command == "hdm-shards" and main(arguments) == 0
    require_unchanged([plan_of(kit, folder)])
    assert not list(notes([plan_of(kit, folder)]))


def test_a_copied_folder_has_not_changed_and_a_touched_shard_is_told(folder, kit, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)
    assert not changes([plan_of(kit, copied)])
    in_seconds = shutil.copytree(folder, tmp_path / "seconds")
    stamp = (folder / "001.tar").stat().st_mtime_ns // 10**9
    index = json.loads((in_seconds / INDEX_NAME).read_text())
    index["shards"][1]["changed"] = stamp * 10**9 + 123_456_789  # on the disk that it was indexed on
    (in_seconds / INDEX_NAME).write_text(json.dumps(index))
    assert not changes([plan_of(kit, in_seconds)])
    set_time(folder / "002.tar", 5000)
    (change,) = changes([plan_of(kit, folder)])
    assert change.shard.url.endswith("002.tar") and not change.certain
    require_unchanged([plan_of(kit, folder)])


def test_where_an_index_has_no_times_shards_younger_than_it_are_looked_into(folder, kit):
    """So it is with indices of earlier versions and of builds."""
    index = json.loads((folder / INDEX_NAME).read_text())
    for entry in index["shards"]:
        del entry["changed"], entry["tag"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    set_time(folder / INDEX_NAME, 2000)
    for seconds in (9, 5000):
        set_time(folder / "001.tar", seconds)
        assert not changes([plan_of(kit, folder)])
    other_samples(folder / "002.tar", random.Random(0), kit)
    (change,) = changes([plan_of(kit, folder)])
    assert change.shard.url == str(folder / "002.tar") and change.certain
    index_shards(folder, times=False)
    assert not any(record.changed for record in load_index(folder).shards)
    longer(folder / "001.tar", random.Random(0), kit)
    assert [change.shard.url for change in changes([plan_of(kit, folder)])] == [str(folder / "001.tar")]


def test_shards_that_no_index_knows_are_told_and_taken_by_the_hint(folder, kit):
    kit.write_tar(folder / "sub" / "new.tar", kit.entries_of(50, 2))
    (note,) = notes([plan_of(kit, folder)])
    assert "1 shards are not in the index" in note and "sub/new.tar" in note
    assert main(note.rpartition("hdm-shards ")[2].split()) == 0
    assert not list(notes([plan_of(kit, folder)])) and load_index(folder).samples == 26
    assert not list(notes([plan_of(kit, f"{folder}/000.tar")]))  # who names shards means those


def test_shards_behind_links_stay_in_the_index_that_the_hint_makes(folder, kit, tmp_path):
    outside = kit.write_shards(tmp_path / "outside", [3])
    (folder / "link").symlink_to(outside)
    index_shards(folder, follow_links=True)
    longer(outside / "000.tar", random.Random(0), kit)
    with pytest.raises(UserError) as caught:
        require_unchanged([plan_of(kit, folder)])
    assert "--follow-links" in caught.value.hint
    assert main(caught.value.hint.split()[1:]) == 0 and load_index(folder).samples == 27


def test_a_server_s_shard_of_another_size_is_masked_and_told(kit, server, tmp_path, caplog):
    shutil.copytree(server.folder, tmp_path / "served")
    server.folder, server.tag = tmp_path / "served", '"1"'
    config = kit.stream_config(server.url)
    assert all(sample.weight for sample in stream(config, kit.letters, stop=150))
    data = (server.folder / "000.tar").read_bytes()
    (server.folder / "000.tar").write_bytes(data + bytes(1024))
    faults = {sample.fault for sample in stream(config, kit.letters, stop=150) if not sample.weight}
    assert faults == {f"replaced shard: has {len(data) + 1024} bytes, the index says {len(data)}"}
    (record,) = caplog.records
    assert "000.tar" in record.message and "hdm-shards index" in record.message


def test_a_server_s_other_version_is_told_once_and_its_samples_are_compared(kit, server, tmp_path, caplog):
    server.tag = '"1"'
    index = index_remote([f"{server.url}/{{000..004}}.tar"], tmp_path / "index.json")
    assert {record.tag for record in index.shards} == {'"1"'} and not any(record.changed for record in index.shards)
    source = Source((f"{server.url}/{{000..004}}.tar",), index=str(tmp_path / "index.json"))
    config = kit.stream_config(server.folder, sources=(source,))
    assert all(sample.weight for sample in stream(config, kit.letters, stop=150)) and not caplog.records
    server.tag = '"2"'
    assert all(sample.weight for sample in stream(config, kit.letters, stop=150))
    (record,) = caplog.records
    assert '"2"' in record.message and '"1"' in record.message


def test_a_remote_shard_that_two_patterns_name_is_indexed_once(server, tmp_path):
    patterns = [f"{server.url}/{{000..002}}.tar", f"{server.url}/002.tar"]
    index = index_remote(patterns, tmp_path / "index.json")
    assert [record.name for record in index.shards] == ["000.tar", "001.tar", "002.tar"] and index.samples == 108


def test_no_more_of_an_index_is_kept_than_one_may_have(server, tmp_path):
    data = (server.folder / INDEX_NAME).read_bytes()
    for place in (f"{server.url}/{INDEX_NAME}", str(server.folder / INDEX_NAME)):
        assert read_whole(place, len(data)) == data
        with pytest.raises(OSError, match="more than"):
            read_whole(place, len(data) - 1)
    assert max(int(span.rpartition("-")[2]) for _, span in server.requests) <= len(data)
