"""Broken shards: each bad sample is a hole in its place, told once, and nothing else changes."""

import json
import random
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.faults import FaultMeter, Quarantine
from hdm_lightning.data.index import load_index
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.errors import UserError


def one_pass(kit, config):
    return list(stream(config, kit.letters, stop=Plan(config).samples))


def test_each_fault_of_a_sample_leaves_a_hole_with_its_reason(kit, tmp_path):
    """Faults that the index cannot see, beside good samples in the same shard."""
    image = kit.coloured(7)
    huge = bytearray(kit.coloured(1))
    huge[16:24] = struct.pack(">II", 60_000, 60_000)  # a PNG that says it is large: the header's CRC is wrong now
    bad = {
        "empty": [("png", image), ("txt", b"")],
        "blank": [("png", image), ("txt", b" \n")],
        "latin1": [("png", image), ("txt", "caf\u00e9".encode("latin-1"))],
        "lonely": [("png", image)],
        "record": [("png", image), ("json", b"{broken")],
        "cut": [("png", image[:60]), ("txt", b"x")],
    }
    entries = kit.entries_of(0, 3)
    for key, fields in bad.items():
        entries += [(f"{key}.{name}", data) for name, data in fields]
    entries += [("bomb.png", bytes(huge)), ("bomb.txt", b"x")]
    index = kit.indexed(tmp_path / "a.tar", entries + kit.entries_of(3, 3))
    assert set(index.shards[0].skip) <= {9} and index.samples >= 12
    config = kit.stream_config(tmp_path, quarantine=str(tmp_path / "log" / "quarantine.jsonl"))
    samples = one_pass(kit, config)
    good = [sample for sample in samples if sample.weight == 1]
    assert sorted(sample.key for sample in good) == [f"a.tar/{n:06d}" for n in range(6)]
    holes = {sample.key.split("/")[1]: sample for sample in samples if sample.weight == 0}
    assert set(bad) <= set(holes)
    for hole in holes.values():
        assert hole.image.shape == (3, 16, 16) and hole.image.max() == 0
        assert hole.length == 1 and hole.tokens == [0] * 24 and hole.caption == "" and hole.fault
        assert hole.crop == (0, 0, 16, 16)
    reasons = {key: holes[key].fault.split(":")[0] for key in bad}
    assert reasons == {
        "empty": "no caption",
        "blank": "no caption",
        "latin1": "caption is not UTF-8",
        "lonely": "no caption",
        "record": "undecodable JSON record",
        "cut": "undecodable image",
    }
    rows = [json.loads(line) for line in (tmp_path / "log" / "quarantine.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == set(holes)
    assert all(set(row) == {"shard", "key", "ordinal", "reason", "index"} for row in rows)
    assert {row["index"] for row in rows} == {hole.index for hole in holes.values()}


def test_a_sample_is_told_once_a_process_however_often_it_comes_back(kit, tmp_path):
    kit.indexed(tmp_path / "a.tar", [*kit.entries_of(0, 3), ("bad.png", kit.coloured(9))])
    config = kit.stream_config(tmp_path, quarantine=str(tmp_path / "q.jsonl"))
    samples = list(stream(config, kit.letters, stop=40))
    assert sum(sample.weight == 0 for sample in samples) == 10
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 10_000, -1024, -1025, -10_240])
def test_a_shard_cut_after_indexing_loses_exactly_what_was_cut(kit, tmp_path, keep):
    folder = kit.write_shards(tmp_path, [9, 9])
    whole = [sample.key for sample in one_pass(kit, kit.stream_config(folder))]
    record = load_index(folder).shards[1]
    data = (folder / "001.tar").read_bytes()[:keep]
    (folder / "001.tar").write_bytes(data)
    table = record.table()
    lost = {9 + n for n in range(9) if table.start[n] + table.size[n] > len(data)}
    samples = one_pass(kit, kit.stream_config(folder))
    assert [sample.index for sample in samples] == list(range(18))
    for sample, key in zip(samples, whole, strict=True):
        number = int(key.split("/")[1])
        assert (sample.weight == 0) == (number in lost)
        assert number in lost or sample.key == key
        assert number not in lost or "truncated" in sample.fault


def test_missing_and_unreadable_shards(kit, tmp_path):
    folder = kit.write_shards(tmp_path, [9, 9, 9])
    whole = [sample.key for sample in one_pass(kit, kit.stream_config(folder))]
    (folder / "000.tar").unlink()
    (folder / "001.tar").unlink()
    (folder / "001.tar").mkdir()
    samples = one_pass(kit, kit.stream_config(folder))
    faults = Counter(sample.fault.split(":")[0] for sample in samples)
    assert faults == {"": 9, "missing shard": 9, "unreadable shard": 9}
    good = [(sample.index, sample.key) for sample in samples if sample.weight]
    assert good == [(place, key) for place, key in enumerate(whole) if key.startswith("002")]


def test_a_shard_that_was_replaced_after_indexing_gives_no_sample(kit, tmp_path):
    """Other bytes than were indexed are not used at all."""
    folder = kit.write_shards(tmp_path, [9])
    kit.write_tar(folder / "000.tar", kit.entries_of(100, 5) + kit.entries_of(200, 9, width=310, height=170))
    samples = one_pass(kit, kit.stream_config(folder))
    assert sum(sample.weight for sample in samples) == 0
    assert all("does not match its index" in sample.fault for sample in samples)


def test_replaced_captions_and_swapped_shards_are_noticed(kit, tmp_path):
    """Changes that leave every offset in place: only the samples' own checks can show them."""
    folder = kit.write_shards(tmp_path, [9, 9])
    first, second = folder / "000.tar", folder / "001.tar"
    changed = first.read_bytes().replace(b"number 3", b"numbed 3")
    first.write_bytes(changed)
    samples = one_pass(kit, kit.stream_config(folder))
    assert [sample.key for sample in samples if not sample.weight] == ["000.tar/#3"]
    kit.write_tar(first, kit.entries_of(20, 9))
    kit.write_tar(second, kit.entries_of(30, 9))
    index_shards(folder)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    faults = {sample.fault for sample in one_pass(kit, kit.stream_config(folder))}
    assert faults == {"the shard does not match its index: other bytes than were indexed"}


def break_bytes(data, rng):
    """One way of damaging a shard; returns the new bytes and a mask of the old ones that still stand in place."""
    broken, kept = bytearray(data), np.ones(len(data), bool)
    way = rng.randrange(6)
    begin = rng.randrange(len(data))
    end = min(len(data), begin + rng.choice([1, 8, 100, 512, 3000]))
    if way == 0:
        begin = begin // 512 * 512 if rng.random() < 0.5 else begin
        return bytes(broken[:begin]), np.arange(len(data)) < begin
    if way == 1:
        broken[begin] ^= 1 << rng.randrange(8)
        end = begin + 1
    elif way == 2:
        broken[begin:end] = bytes(end - begin)
    elif way == 3:
        broken[begin:end] = rng.randbytes(end - begin)
    elif way == 4:
        del broken[begin:end]
        end = len(data)
    else:
        broken[begin:begin] = rng.randbytes(rng.choice([1, 512]))
        end = len(data)
    kept[begin:end] = False
    return bytes(broken), kept


@pytest.mark.parametrize("block", range(8))
def test_four_hundred_ways_to_break_shards(kit, tmp_path, block):
    """Whatever is done to the bytes, every untouched sample is given as planned and the rest are holes or readable."""
    folder = kit.write_shards(tmp_path, [6, 9])
    index = load_index(folder)
    originals = {record.name: (folder / record.name).read_bytes() for record in index.shards}
    config = kit.stream_config(folder, captions=CaptionRules(drop=0.0), quarantine=str(tmp_path / "q.jsonl"))
    reference = one_pass(kit, config)
    holes = 0
    for seed in range(50 * block, 50 * block + 50):
        rng = random.Random(seed)
        whole = set()
        for record in index.shards:
            data, kept = originals[record.name], np.ones(len(originals[record.name]), bool)
            for _ in range(rng.randrange(3)):
                if len(data):
                    data, still = break_bytes(data, rng)
                    kept[: len(still)] &= still[: len(kept)]
                    kept[len(still) :] = False
            (folder / record.name).write_bytes(data)
            table = record.table()
            for start, size, ordinal in zip(table.start, table.size, table.ordinal, strict=True):
                if kept[start : start + size].all():
                    whole.add((record.name, int(ordinal)))
        samples = one_pass(kit, config)
        assert [sample.index for sample in samples] == [sample.index for sample in reference]
        plan = Plan(config)
        for sample, expected in zip(samples, reference, strict=True):
            place = plan.locate(sample.index)
            name = plan.parts[place.part].shards[place.shard].record.name
            if (name, place.rank) in whole:
                assert (sample.key, sample.caption, sample.weight) == (expected.key, expected.caption, 1.0), seed
                assert np.array_equal(sample.image, expected.image), seed
            holes += sample.weight == 0
    assert holes > 100


@pytest.mark.parametrize("block", range(4))
def test_two_hundred_broken_shards_can_be_indexed_and_streamed(kit, tmp_path, block):
    """Damage that was there before the index: indexing never fails, and what it counts can be streamed."""
    folder = kit.write_shards(tmp_path, [6, 9])
    originals = {path: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
    for seed in range(50 * block, 50 * block + 50):
        rng = random.Random(1000 + seed)
        for path, data in originals.items():
            for _ in range(rng.randrange(1, 3)):
                data = break_bytes(data, rng)[0] if data else data
            path.write_bytes(data)
        index = index_shards(folder)
        if index.samples:
            samples = one_pass(kit, kit.stream_config(folder))
            assert len(samples) == index.samples
            keys = [sample.key for sample in samples if sample.weight]
            assert len(set(keys)) == len(keys)


def test_too_many_bad_samples_stop_the_run_with_a_message(kit, tmp_path):
    good, bad = kit.entries_of(0, 15), [(f"bad{n}.png", kit.coloured(n)) for n in range(5)]
    kit.indexed(tmp_path / "a.tar", good + bad)
    patient = kit.stream_config(tmp_path, max_bad_share=0.3, bad_patience=10)
    assert sum(sample.weight == 0 for sample in stream(patient, kit.letters, stop=100)) == 25
    strict = replace(patient, max_bad_share=0.1, bad_patience=50)
    with pytest.raises(UserError, match=r"of the last 5\d samples could not be used.*no caption") as caught:
        list(stream(strict, kit.letters, stop=1000))
    assert caught.value.hint is not None and "set data.quarantine=FILE" in caught.value.hint
    with pytest.raises(UserError) as caught:
        list(stream(replace(strict, quarantine=str(tmp_path / "bad.jsonl")), kit.letters, stop=1000))
    assert f"see {tmp_path / 'bad.jsonl'}," in caught.value.hint
    for workers in (0, 2):
        strict = {"max_bad_share": 0.1, "bad_patience": 50}
        module = kit.data_module(tmp_path, num_workers=workers, batch_size=5, **strict)
        with pytest.raises(UserError, match="could not be used"):
            for _, _ in zip(range(100), module.train_dataloader(), strict=False):
                pass


def test_meter_counts_by_the_first_part_of_the_reason():
    meter = FaultMeter(0.5, 4)
    for reason in ("a: x", None, "a: y"):
        meter.count(reason)
    assert (meter.seen, meter.bad, meter.reasons["a"]) == (3, 2, 2)
    meter.count(None)
    with pytest.raises(UserError, match=r"3 of the last 5 .* a \(2\), b \(1\)"):
        meter.count("b")


@pytest.mark.parametrize("good", [0, 3_000, 100_000])
def test_a_source_that_dies_late_is_noticed_as_soon_as_one_that_dies_early(good):
    """A twentieth of bad samples is borne: at most 1,000 of 20,000 that count, however many came before."""
    meter = FaultMeter(0.05, 1000)
    for _ in range(good):
        meter.count(None)
    with pytest.raises(UserError, match=r"more than 5\.0%: unreadable shard"):
        for _ in range(1100):
            meter.count("unreadable shard: timed out")


def test_a_share_below_the_limit_never_stops_a_long_run():
    meter = FaultMeter(0.05, 1000)
    for number in range(200_000):
        meter.count("no caption" if number % 25 == 0 else None)
    assert 10_000 <= meter.seen <= 20_000 and abs(meter.bad / meter.seen - 0.04) < 0.002


def test_quarantine_lines_of_many_processes_do_not_mix(tmp_path):
    import multiprocessing

    path = str(tmp_path / "q.jsonl")
    jobs = [multiprocessing.Process(target=_write_lines, args=(path, job)) for job in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert sorted((row["shard"], row["ordinal"]) for row in rows) == [
        (f"s{j}", n) for j in range(4) for n in range(100)
    ]


def _write_lines(path, job):
    quarantine = Quarantine(path)
    for number in range(100):
        quarantine.add(shard=f"s{job}", key="k" * 50, ordinal=number, reason="r" * 400, index=number)


def test_errors_of_the_tokenizer_are_not_taken_for_bad_samples(kit, shards):
    def broken(text):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        next(stream(kit.stream_config(shards), broken))


def test_strange_pictures_are_used_where_they_can_be(kit, tmp_path):
    """CMYK, 16-bit, palette, alpha, turned, animated, thin: all in one shard, all good."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "cmyk.jpg": kit.encoded(Image.new("CMYK", (40, 30), (10, 90, 20, 5)), "JPEG"),
        "deep.png": kit.encoded(Image.new("I;16", (30, 30), 40_000)),
        "palette.png": kit.encoded(Image.new("P", (30, 30), 3)),
        "alpha.webp": kit.encoded(Image.new("RGBA", (30, 30), (1, 2, 3, 100)), "WEBP"),
        "turned.jpg": kit.encoded(Image.new("RGB", (40, 30)), "JPEG", exif=exif),
        "moving.gif": kit.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "thin.png": kit.encoded(Image.new("RGB", (100, 13))),
        "grey.jpg": kit.encoded(Image.new("L", (50, 50), 9), "JPEG"),
    }
    entries = [
        entry for name, data in pictures.items() for entry in ((name, data), (name.split(".")[0] + ".txt", b"x"))
    ]
    strip = [("strip.png", kit.encoded(Image.new("RGB", (5000, 1)))), ("strip.txt", b"x")]
    assert kit.indexed(tmp_path / "a.tar", entries + strip).samples == 9
    samples = one_pass(kit, kit.stream_config(tmp_path))
    assert len(samples) == 8 and all(sample.weight == 1 for sample in samples)
    crops = {sample.key.split("/")[1]: sample.crop for sample in samples}
    assert crops["turned"][2:] == (21, 16) and crops["cmyk"][2:] == (16, 21)


def test_the_quarantine_begins_a_line_of_its_own_and_follows_no_link(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"shard": "half a li')
    Quarantine(str(path)).add(shard="s", key="k", ordinal=1, reason="r", index=2)
    first, second = path.read_text().splitlines()
    assert first == '{"shard": "half a li' and json.loads(second)["ordinal"] == 1
    victim, link = tmp_path / "victim", tmp_path / "link.jsonl"
    victim.write_text("mine")
    link.symlink_to(victim)
    with pytest.raises(UserError, match="is a symbolic link"):
        Quarantine(str(link)).add(shard="s", key="k", ordinal=1, reason="r", index=2)
    assert victim.read_text() == "mine"
