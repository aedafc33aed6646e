"""Columns in a file of their own: the same plan as with columns in the index, local and remote, and what is refused."""

import base64
import json
import os
import pickle
import zlib
from dataclasses import replace

import numpy as np
import pytest

from hdm_lightning.data import index as index_module
from hdm_lightning.data import index_columns
from hdm_lightning.data.crops import Buckets, CropRules
from hdm_lightning.data.index import load_index, write_index
from hdm_lightning.data.index_columns import unpack
from hdm_lightning.data.rules import Source
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.data.verification import Problem, leave_out
from hdm_lightning.errors import UserError


@pytest.fixture
def folder(kit, tmp_path, monkeypatch):
    """150 samples of three sizes, whose index has its columns beside it."""
    monkeypatch.setattr(index_module, "INLINE_BYTES", 0)
    folder, number = tmp_path / "set", 0
    for shard, counts in enumerate([(20, 20, 20), (0, 50, 0), (13, 7, 20)]):
        entries = []
        for count, (width, height) in zip(counts, [(16, 16), (40, 20), (20, 47)], strict=True):
            entries += kit.entries_of(number, count, width=width, height=height)
            number += count
        kit.write_tar(folder / f"{shard:03d}.tar", entries)
    index_shards(folder)
    return folder


def columns_file(folder):
    (file,) = folder.glob("*.columns")
    return file


def written_inline(folder, monkeypatch, to):
    with monkeypatch.context() as context:
        context.setattr(index_module, "INLINE_BYTES", 1 << 30)
        write_index(load_index(folder), to)
    return to


@pytest.mark.parametrize(
    "crop",
    [{}, {"min_size_px": 18}, {"max_aspect": 2.1}, {"buckets": {"step_px": 8, "block": 20}}, {"max_upscale": 0.8}],
)
def test_a_plan_is_the_same_wherever_the_columns_are(kit, folder, monkeypatch, crop):
    beside = load_index(folder)
    inline = written_inline(folder, monkeypatch, folder / "inline.json")
    assert load_index(inline).shards == beside.shards and "columns" not in json.loads(inline.read_text())
    configs = [
        kit.stream_config(sources=(Source((str(folder),), index=place),), crop=crop_rules(crop))
        for place in (None, str(inline))
    ]
    plans = [Plan(config) for config in configs]
    assert plans[0].fingerprint == plans[1].fingerprint and plans[0].samples == plans[1].samples
    for position in range(0, 400, 7):
        assert plans[0].locate(position).key == plans[1].locate(position).key
    keys = [[sample.key for sample in stream(config, kit.letters, stop=60)] for config in configs]
    assert keys[0] == keys[1] and len(set(keys[0])) > 30


def crop_rules(crop):
    buckets = crop.get("buckets")
    return CropRules(**{**crop, "buckets": Buckets(**buckets) if buckets else None})


def test_samples_of_a_plan_are_those_that_the_rules_name_one_by_one(kit, folder):
    """By the pictures' own sizes, in squares and in buckets."""
    shapes = [record.shapes() for record in load_index(folder).shards]
    squares = Plan(kit.stream_config(folder, crop=crop_rules({"min_size_px": 18, "max_aspect": 2.2})))
    expected = [
        np.flatnonzero((np.minimum(h, w) >= 18) & (np.maximum(h, w) <= 2.2 * np.minimum(h, w))) for h, w in shapes
    ]
    (part,) = squares.parts
    found = {shard.url[-7:]: np.arange(shard.record.samples)[shard.rows()].tolist() for shard in part.shards}
    assert found == {f"{n:03d}.tar": rows.tolist() for n, rows in enumerate(expected) if len(rows)}
    for shard in part.shards:
        assert (np.minimum(*shard.shapes()) >= 18).all() and len(shard.table().start) == shard.samples
    buckets = Plan(
        kit.stream_config(folder, crop=crop_rules({"buckets": {"step_px": 8, "block": 20, "max_aspect": 4.0}}))
    )
    shown = set()
    for shape, part in zip(buckets.shapes, buckets.parts, strict=True):
        for shard in part.shards:
            own = np.log(np.divide(*shard.shapes()[::-1]))
            nearest = [
                min(buckets.shapes, key=lambda each, ratio=ratio: abs(np.log(each[1] / each[0]) - ratio))
                for ratio in own
            ]
            assert set(nearest) == {shape} and len(own) == shard.samples
            shown |= {(shard.url, row) for row in np.arange(shard.record.samples)[shard.rows()].tolist()}
    assert len(shown) == 150 == sum(buckets.shapes.values())


def test_rewriting_leaves_one_file_and_the_same_set_has_the_same_bytes(folder, monkeypatch):
    first, content = columns_file(folder).name, (folder / "index.json").read_bytes()
    before = load_index(folder)
    index_shards(folder, times=True)
    assert columns_file(folder).name == first and (folder / "index.json").read_bytes() == content
    (folder / "000.tar").unlink()
    index_shards(folder)
    assert columns_file(folder).name != first and load_index(folder).samples == 90
    assert before.shards[0].shapes()[0].tolist() == [16] * 20 + [20] * 20 + [47] * 20  # a reader of the old one goes on
    written_inline(folder, monkeypatch, folder / "index.json")
    assert not list(folder.glob("*.columns")) and load_index(folder).samples == 90


@pytest.mark.parametrize("name", ["my set.json", "set[1].json", "1*.json", ".hidden.json", "-a.json", "größe.json"])
def test_an_index_of_any_name_is_read_again_and_leaves_those_of_others(folder, name):
    index, there = load_index(folder), [folder / "set1.json", folder / "11.json"]
    for file in there:
        write_index(index, file)
    for shards in (index.shards, index.shards[:2]):
        write_index(replace(index, shards=shards), folder / name)
        assert load_index(folder / name).shards == shards
    assert [load_index(file).shards for file in (folder, *there)] == [index.shards] * 3
    assert len(list(folder.glob("*.columns"))) == 4


def test_an_index_that_is_written_anew_while_it_is_read_is_read_whole(folder, monkeypatch):
    before = load_index(folder)
    read = index_module.read_whole

    def rewritten(file, most):
        monkeypatch.setattr(index_module, "read_whole", read)
        content = read(file, most)
        write_index(replace(before, shards=before.shards[:2]), folder / "index.json")
        return content

    monkeypatch.setattr(index_module, "read_whole", rewritten)
    assert load_index(folder).shards == before.shards[:2]


def test_a_record_goes_to_another_process_with_columns_of_its_own(folder):
    record = load_index(folder).shards[2]
    again = pickle.loads(pickle.dumps(record))
    assert again == record and isinstance(again.height, bytes) and isinstance(again.sizes[0], bytes)
    assert again.table().start.tolist() == record.table().start.tolist()


def test_columns_of_a_remote_index_are_fetched(kit, folder, server):
    server.folder = folder
    remote = kit.stream_config(sources=(Source((server.url,)),))
    local = kit.stream_config(folder)
    keys = [[sample.key for sample in stream(config, kit.letters, stop=20)] for config in (remote, local)]
    assert keys[0] == keys[1]
    assert {path for path, _ in server.requests} >= {f"/{columns_file(folder).name}", "/index.json"}


def test_leaving_a_sample_out_writes_no_column_again_and_reads_each_once(folder, monkeypatch):
    """Millions of samples have a large file of them, and a mark changes none of its numbers."""
    file = columns_file(folder)
    before = os.stat(file)
    record = load_index(folder).shards[1]
    with monkeypatch.context() as patched:
        patched.setattr(index_columns, "_holds", None)
        remaining = leave_out(folder, [Problem(record.name, "blurred", 7, "key")])
    after = os.stat(columns_file(folder))
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert load_index(folder).samples == remaining.samples == 149
    remaining = pickle.loads(pickle.dumps(remaining))  # no longer mapped from the file
    file.write_bytes(bytes(before.st_size))  # of the right name and size, and damaged since
    write_index(remaining, folder / "index.json")
    assert load_index(folder).shards[0].shapes()[0].sum() == 20 * (16 + 20 + 47)


def test_a_server_cannot_fill_the_disk_with_columns(kit, folder, server):
    document = json.loads((folder / "index.json").read_text())
    document["columns"]["bytes"] = index_module.MOST_BYTES + 1
    (folder / "index.json").write_text(json.dumps(document))
    server.folder = folder
    with pytest.raises(UserError, match="bytes of columns"):
        load_index(server.url)
    assert [path for path, _ in server.requests] == ["/index.json"]


@pytest.mark.parametrize("damage", ["gone", "short", "long", "flipped", "name", "outside", "bytes", "lengths", "pipe"])
def test_damage_is_a_message_that_helps(folder, damage):
    file, document = columns_file(folder), json.loads((folder / "index.json").read_text())
    content = bytearray(file.read_bytes())
    if damage in ("gone", "pipe"):
        file.unlink()
    if damage == "pipe":  # nobody writes into it
        os.mkfifo(file)
    if damage == "flipped":
        file.write_bytes(bytes(len(content)))
    elif damage in ("short", "long"):
        file.write_bytes(content[:-3] if damage == "short" else content + b"xyz")
    elif damage == "lengths":
        document["shards"][0]["height"] += 1
    odd = {"name": {"file": 7}, "outside": {"file": "../set/x.columns"}, "bytes": {"bytes": -1}}
    document["columns"] |= odd.get(damage, {})
    (folder / "index.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="index") as caught:
        [record.shapes() for record in load_index(folder).shards]
    assert "hdm-shards index" in caught.value.hint
    if damage == "pipe":
        file.unlink()
    index_shards(folder)  # as the hint says
    assert load_index(folder).shards[0].shapes()[0].sum() == 20 * (16 + 20 + 47)


def test_an_index_of_the_version_before_is_read(folder, monkeypatch):
    """Which had four or eight bytes a number, and all columns inside."""
    whole = load_index(folder)
    document = json.loads(written_inline(folder, monkeypatch, folder / "index.json").read_text())

    def older(column, count):
        numbers = unpack(base64.b64decode(column), count).astype("<u4")
        planes = numbers.view(np.uint8).reshape(-1, 4).T.tobytes()
        return base64.b64encode(zlib.compress(planes)).decode()

    for entry in document["shards"]:
        for name in ("height", "width", "layout", "key_length", "check"):
            entry[name] = older(entry[name], entry["samples"])
        entry["sizes"] = [older(column, entry["samples"]) for column in entry["sizes"]]
    (folder / "index.json").write_text(json.dumps({**document, "format": 2}))
    for old, new in zip(load_index(folder).shards, whole.shards, strict=True):
        assert np.array_equal(old.shapes(), new.shapes())
        assert np.array_equal(old.table().sizes, new.table().sizes)
