"""Indices of shards, against the standard library and webdataset."""

import base64
import hashlib
import io
import json
import os
import resource
import tarfile
import time
import zlib

import numpy as np
import pytest
import webdataset
from PIL import Image

from hdm_lightning.data.index import load_index
from hdm_lightning.data.index_columns import pack, unpack
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.sample_table import parse_sample
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.data.tar import members
from hdm_lightning.data.verification import verify
from hdm_lightning.errors import UserError


def test_index_of_webdataset_shards_finds_each_sample_where_it_lies(tmp_path):
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            image = io.BytesIO()
            Image.fromarray(np.full((number + 1, 5, 3), number, np.uint8)).save(image, "JPEG")
            writer.write({"__key__": f"k{number}", "jpg": image.getvalue(), "txt": f"caption {number}"})
    index = index_shards(tmp_path)
    assert index.samples == 20
    record = index.shards[0]
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record.bytes == path.stat().st_size
    table, data = record.table(), path.read_bytes()
    height, width = record.shapes()
    assert height.tolist() == list(range(1, 21)) and set(width.tolist()) == {5}
    theirs = [(sample["__key__"], sample["txt"]) for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    ours = []
    for start, size, form in zip(table.start.tolist(), table.size.tolist(), table.forms(), strict=True):
        sample = form.cut(data[start : start + size])
        assert sample == parse_sample(data[start : start + size])
        ours.append((sample.key, sample.members["txt"]))
    assert ours == theirs


def test_what_can_never_be_used_is_left_out_with_its_reason(tmp_path, kit):
    image = kit.coloured(1)
    entries = [
        ("README.md", b"no sample, but a key of its own"),
        ("good.png", image),
        ("good.txt", b"x"),
        ("lonely.txt", b"no image"),
        ("../escape.png", image),
        ("twice.png", image),
        ("twice.png", image),
        ("void.png", b""),
        ("noise.png", b"\x89PNG and then nothing"),
        ("strange.png", b"what is this"),
        ("last.png", image),
        ("last.txt", b"y"),
        ("good.png", image),
    ]
    record = kit.indexed(tmp_path / "a.tar", entries).shards[0]
    reasons = {
        0: "no image",
        2: "no image",
        3: "unsafe member name",
        5: "duplicate key",
        6: "empty image",
        7: "undecodable image",
        8: "undecodable image",
        10: "duplicate key",
    }
    assert {ordinal: reason.split(":")[0] for ordinal, reason in record.skip.items()} == reasons
    assert record.samples == 3 and record.table().ordinal.tolist() == [1, 4, 9]


def test_cut_archives_are_noted_and_lose_their_last_sample(tmp_path, kit):
    whole = kit.write_tar(tmp_path / "a.tar", kit.entries_of(0, 5)).read_bytes()
    ends = [member.end for member in members(kit.reader_of(whole), 0, len(whole))]
    for cut, samples, note in [
        (ends[8], 2, "no end mark"),  # at a header boundary, after three whole samples
        (ends[8] + 100, 2, "inside a header"),
        (ends[8] + 600, 2, "inside a member"),
        (0, 0, "an empty file"),
    ]:
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        record = index_shards(tmp_path).shards[0]
        assert (record.samples, note in record.note) == (samples, True), (cut, record.note)


def test_an_index_reads_back_as_it_was_written_and_names_its_mistakes(tmp_path, kit):
    folder = kit.write_shards(tmp_path / "s", [3, 4])
    written = index_shards(folder, jobs=2)
    assert load_index(folder).shards == written.shards == load_index(f"{folder}/index.json").shards
    assert load_index(folder).samples == 7
    with pytest.raises(UserError, match="no such folder"):
        index_shards(tmp_path / "nowhere")
    document = json.loads((folder / "index.json").read_text())
    for broken in ("{", "[]", json.dumps({**document, "format": 99}), json.dumps({"format": 1})):
        (folder / "index.json").write_text(broken)
        with pytest.raises(UserError, match="index"):
            load_index(folder)


def test_columns_survive_packing():
    column = np.array([0, 1, 511, 2**32 - 1])
    assert unpack(pack(column), 4).tolist() == column.tolist()
    assert unpack(pack([]), 0).tolist() == []
    assert unpack(pack([7, 2**40]), 2).tolist() == [7, 2**40]
    for packed, count in ((pack(column), 3), (pack(column), 5), (pack([1, 2**40]), 3), (b"x", 1), (b"", 1)):
        with pytest.raises(ValueError, match="column"):
            unpack(packed, count)
    with pytest.raises(ValueError, match="column"):
        unpack(zlib.compress(bytes(1 << 26)), 4)


def test_an_interrupted_index_goes_on_and_new_shards_can_be_added(tmp_path, kit):
    folder = kit.write_shards(tmp_path / "s", [2, 3, 4, 5])
    for path in folder.glob("*.tar"):
        os.utime(path, (1e9, 1e9))
    whole = index_shards(folder)
    (folder / "index.json").unlink()
    read = []

    def interrupt(record):
        read.append(record.name)
        if len(read) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_shards(folder, progress=interrupt)
    assert not (folder / "index.json").exists()
    read.clear()
    assert index_shards(folder, progress=lambda record: read.append(record.name)) == whole
    assert read == ["002.tar", "003.tar"] and sorted(path.name for path in folder.iterdir())[-1] == "index.json"
    kit.write_tar(folder / "004.tar", kit.entries_of(50, 1))
    kit.write_tar(folder / "001.tar", kit.entries_of(60, 3))  # younger than the index
    read.clear()
    grown = index_shards(folder, new_only=True, progress=lambda record: read.append(record.name))
    assert sorted(read) == ["001.tar", "004.tar"] and grown == index_shards(folder)


def test_damage_to_the_end_of_an_index_write_leaves_the_old_one(tmp_path, kit, monkeypatch):
    from hdm_lightning.data import index as indexing

    folder = kit.write_shards(tmp_path / "s", [2])
    before = (folder / "index.json").read_bytes()
    monkeypatch.setattr(indexing.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk")))
    kit.write_tar(folder / "001.tar", kit.entries_of(50, 1))
    with pytest.raises(OSError, match="disk"):
        index_shards(folder)
    assert (folder / "index.json").read_bytes() == before


@pytest.mark.parametrize(
    ("made", "what", "hint"),
    [
        (None, "no such folder", "hdm-shards build"),
        ((), "no shards", "hdm-shards build"),
        (("0.tar",), "no index", "hdm-shards index"),
    ],
)
def test_what_is_missing_is_named_with_what_makes_it(tmp_path, made, what, hint):
    folder = tmp_path / "shards"
    if made is not None:
        folder.mkdir()
        for name in made:
            (folder / name).touch()
    with pytest.raises(UserError, match=what) as caught:
        load_index(folder)
    assert str(folder) in caught.value.where and hint in caught.value.hint


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_cut_by_the_index_as_the_headers_say(tmp_path, kit, form, monkeypatch):
    """Long and foreign names, folders, links and nameless members in between: no header is parsed when loading."""
    image, path = kit.coloured(3), tmp_path / "a.tar"
    stems = ["a", "d/b.c".replace(".", "_"), "ünï", "d" * 60 + "/" + "e" * 60]
    stems += [] if form == tarfile.USTAR_FORMAT else ["x" * 180]
    with tarfile.open(path, "w", format=form) as archive:
        for number, stem in enumerate(stems):
            for extension, data in (("PNG", image), ("txt", f"caption {number}".encode()), ("json", b"{}")):
                member = tarfile.TarInfo(f"{stem}.{extension}")
                member.size, member.mtime = len(data), 1.5
                archive.addfile(member, io.BytesIO(data))
                if extension == "txt":
                    link = tarfile.TarInfo("link")
                    link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
                    archive.addfile(link)
    table, data = index_shards(tmp_path).shards[0].table(), path.read_bytes()
    ranges = [data[start : start + size] for start, size in zip(table.start, table.size, strict=True)]
    expected = [parse_sample(each) for each in ranges]
    assert [sample.key for sample in expected] == stems
    split = [number for number, stem in enumerate(stems) if form == tarfile.USTAR_FORMAT and len(stem) > 100]
    monkeypatch.setattr("hdm_lightning.data.sample_table.members", None)
    for number, (form_, each) in enumerate(zip(table.forms(), ranges, strict=True)):
        if number in split:  # a name in two pieces has to be parsed
            with pytest.raises(TypeError):
                form_.cut(each)
        else:
            assert form_.cut(each) == expected[number]


def test_an_index_of_another_format_is_refused_and_renewing_it_keeps_the_order(tmp_path, kit):
    folder = kit.write_shards(tmp_path / "s", [5, 6])
    fingerprint, document = Plan(kit.stream_config(folder)).fingerprint, json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**document, "format": 1}))
    with pytest.raises(UserError, match="format 1") as caught:
        Plan(kit.stream_config(folder))
    assert "hdm-shards index" in caught.value.hint
    assert index_shards(folder, new_only=True).samples == 11
    assert Plan(kit.stream_config(folder)).fingerprint == fingerprint


def test_members_behind_damage_are_found_and_the_gap_is_noted(tmp_path, kit):
    whole = kit.write_tar(tmp_path / "a.tar", kit.entries_of(0, 8)).read_bytes()
    found = list(members(kit.reader_of(whole), 0, len(whole)))
    starts = [member.start for member in found]

    def indexed(data):
        (tmp_path / "a.tar").write_bytes(data)
        record = index_shards(tmp_path).shards[0]
        keys = [form.cut(data[start : start + size]).key for form, start, size in rows(record.table())]
        return keys, record

    # the header of an image, a caption, a record: at an edge nobody knows whose it was
    for victim, lost in ((9, {"000002", "000003"}), (10, {"000003"}), (11, {"000003", "000004"})):
        for wipe in (bytes(512), b"\xff" * 512):
            data = whole[: starts[victim]] + wipe + whole[starts[victim] + 512 :]
            keys, record = indexed(data)
            assert set(keys) == {f"{n:06d}" for n in range(8)} - lost and "passed over" in record.note
    # two archives joined: the end mark of the first stands in the middle, and nothing is lost
    other = kit.write_tar(tmp_path / "b.tar", kit.entries_of(50, 3)).read_bytes()
    (tmp_path / "b.tar").unlink()
    keys, record = indexed(whole + other)
    assert len(keys) == 11 and "end mark" in record.note and not record.skip
    keys, record = indexed(whole + b"trailing".ljust(700))
    assert len(keys) == 8 and "end mark" in record.note
    assert not indexed(whole + bytes(100_000))[1].note


def rows(table):
    return zip(table.forms(), table.start.tolist(), table.size.tolist(), strict=True)


def pax_header(name, records):
    """A member behind a PAX header of any content."""
    header, member = tarfile.TarInfo("PaxHeader"), tarfile.TarInfo(name)
    header.type, header.size, member.size = tarfile.XHDTYPE, len(records), 1
    padding = bytes(-len(records) % 512)
    return header.tobuf() + records + padding + member.tobuf() + b"x".ljust(512, b"\0") + bytes(1024)


@pytest.mark.parametrize(
    "records",
    [
        b"9" * 5000 + b" path=x\n",
        b"1 " * 200_000,
        b"7 a=b\n" * 400_000,
        b"-7 a=b\n",
        b"0 path=x\n",
        b"path=x",
        b"3 path=x\n",
    ],
)
def test_hostile_pax_headers_are_damage_of_their_shard_alone(tmp_path, kit, records):
    kit.write_shards(tmp_path, [2])
    (tmp_path / "bad.tar").write_bytes(pax_header("a.txt", records))
    begin = time.monotonic()
    index = index_shards(tmp_path)
    assert time.monotonic() - begin < 5
    assert index.samples == 2 and "damaged tar header" in index.shards[1].note


def test_an_unfinished_index_grows_by_a_line_a_shard(tmp_path, kit):
    """What was written is never written again: twice the shards, twice the bytes."""
    sizes = []
    for count in (20, 40):
        folder, before = kit.write_shards(tmp_path / str(count), [1] * count), b""

        def grows(record, part=folder / ".index-part.jsonl"):
            nonlocal before
            now = part.read_bytes()
            assert now.startswith(before)
            before = now

        index_shards(folder, progress=grows)
        assert len(before.splitlines()) == count - 1
        sizes.append(len(before) / (count - 1))
    assert sizes[1] / sizes[0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../a.tar"},
        {"name": "/dev/zero"},
        {"name": "a\0.tar"},
        {"samples": -1},
        {"samples": 10**9},
        {"samples": True},
        {"samples": "3"},
        {"bytes": None},
        {"first_block": -5},
        {"skip": {"99": "x"}},
        {"skip": {"-1": "x"}},
        {"skip": {"x": "y"}},
        {"height": "é"},
        {"height": 5},
        {"layouts": [[0, [["png", -1]], 0]]},
        {"layouts": 3},
        {"sizes": "x"},
    ],
)
def test_records_that_make_no_sense_are_refused_with_the_file(tmp_path, kit, change):
    folder = kit.write_shards(tmp_path / "s", [3])
    document = json.loads((folder / "index.json").read_text())
    document["shards"][0] |= change
    (folder / "index.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_index(folder)
    assert caught.value.where.endswith("index.json") and caught.value.hint.endswith(f"hdm-shards index {folder}")
    (folder / "index.json").rename(folder / "other.json")
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_index(folder / "other.json")
    assert "in place of this one" in caught.value.hint  # the command for the folder would leave it as it is


def test_an_index_larger_than_any_is_not_read(tmp_path):
    """Nine gigabytes on no disk: what a sparse file claims would fill the memory."""
    (tmp_path / "a.tar").touch()
    with open(tmp_path / "index.json", "wb") as file:
        file.truncate(9 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="has more than 8,589,934,592 bytes"):
        load_index(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 2},
        {"first_block": 10**6},
        {"height": base64.b64encode(zlib.compress(bytes(1 << 26))).decode()},
        {"width": base64.b64encode(b"no zlib").decode()},
        {"layouts": []},
        {"sizes": []},
        {"check": base64.b64encode(pack([1])).decode()},
        {"sizes": [base64.b64encode(pack([2**61] * 3)).decode()] * 3},
    ],
)
def test_records_that_contradict_themselves_are_told_at_the_start(tmp_path, kit, change):
    folder = kit.write_shards(tmp_path / "s", [3])
    document = json.loads((folder / "index.json").read_text())
    document["shards"][0] |= change
    (folder / "index.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="contradicts itself") as caught:
        next(stream(kit.stream_config(folder), kit.letters))
    assert caught.value.where == "000.tar"
    for decode in (False, True):
        (problem,) = verify(folder, decode=decode)
        assert problem.shard == "000.tar" and "contradicts itself" in problem.reason


def test_brackets_without_end_and_pipes_without_writer_hold_up_nobody(tmp_path, kit):
    folder = kit.write_shards(tmp_path / "s", [3])
    (folder / "000.tar").unlink()
    os.mkfifo(folder / "000.tar")
    samples = list(stream(kit.stream_config(folder), kit.letters, stop=3))
    assert all("unreadable shard" in sample.fault for sample in samples)
    with pytest.raises(UserError, match="that is not a file"):
        index_shards(folder)
    (folder / "index.json").write_text("[" * 1_000_000)
    with pytest.raises(UserError, match="cannot be read"):
        load_index(folder)
