"""The stream and its loaders: one global sequence, whatever the ranks, workers and restarts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from hdm_lightning.data import reader
from hdm_lightning.data.captions import CaptionRules, TagGrammar
from hdm_lightning.data.crops import Buckets, CropRules
from hdm_lightning.data.loader import StreamLoader
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.errors import UserError

SAMPLES = 150


def batches(module, count):
    iterator = iter(module.train_dataloader())
    return [next(iterator) for _ in range(count)]


def number_of(image):
    """The number that a picture was coloured with."""
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def test_a_batch_is_what_the_contract_says(kit, shards):
    for batch in batches(kit.data_module(shards, batch_size=6), 3):
        assert {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)} == {
            "image": (6, 3, 16, 16),
            "crop": (6, 4),
            "tokens": (6, 24),
            "lengths": (6,),
            "index": (6,),
            "weight": (6,),
        }
        types = [batch[name].dtype for name in ("image", "crop", "tokens", "lengths", "index", "weight")]
        assert types == [torch.uint8, torch.float32, torch.int64, torch.int64, torch.int64, torch.float32]
        assert batch["image"].is_contiguous()
        for row in range(6):
            number = number_of(batch["image"][row])
            assert batch["keys"][row].split("/")[1] == f"{number:06d}"
            caption = batch["captions"][row]
            assert caption in (f"number {number}", "")
            length = int(batch["lengths"][row])
            assert length == max(1, len(caption))
            assert bytes(batch["tokens"][row, : len(caption)].tolist()).decode() == caption
            assert batch["tokens"][row, length:].sum() == 0
            assert batch["crop"][row].tolist() == [0, 0, 16, 16] and batch["weight"][row] == 1


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_workers_give_the_same_global_sequence(kit, shards, workers, world):
    config = kit.stream_config(shards, captions=CaptionRules(drop=0.3))
    expected = {
        sample.index: (sample.key, sample.caption, sample.crop)
        for sample in stream(config, kit.letters, start=37, stop=37 + 200)
    }
    assert sorted(expected) == list(range(37, 237))
    found = {}
    plan = Plan(config)
    for rank in range(world):
        loader = StreamLoader(
            replace(config, workers=workers), plan, kit.letters, batch_size=5, rank=rank, world=world, start=37
        )
        iterator = iter(loader)
        previous = -1
        while previous < 236 - world:
            batch = next(iterator)
            for row, index in enumerate(batch["index"].tolist()):
                assert index % world == rank and index > previous
                previous = index
                crop = tuple(batch["crop"][row].tolist())
                found[index] = (batch["keys"][row], batch["captions"][row], crop)
    assert {index: found[index] for index in expected} == expected


def test_each_sample_comes_once_a_pass_and_global_batches_cover_their_positions(kit, shards):
    module = kit.data_module(shards, batch_size=5, consumed=150)
    indices = [index for batch in batches(module, 60) for index in batch["index"].tolist()]
    assert indices == list(range(150, 450))
    keys = [sample.key for sample in stream(kit.stream_config(shards), kit.letters, stop=450)]
    for begin in (0, 150, 300):
        assert len(set(keys[begin : begin + SAMPLES])) == SAMPLES
    assert keys[:150] != keys[150:300]


def test_resuming_on_other_ranks_and_workers_continues_the_sequence(kit, shards):
    config = kit.stream_config(shards)
    whole = [sample.key for sample in stream(config, kit.letters, stop=300)]
    done, keys = 0, {}
    for world, workers, steps in [(1, 0, 3), (2, 1, 4), (4, 2, 2), (3, 0, 3), (1, 3, 5)]:
        for rank in range(world):
            loader = StreamLoader(
                replace(config, workers=workers),
                Plan(config),
                kit.letters,
                batch_size=4,
                rank=rank,
                world=world,
                start=done,
            )
            for _, batch in zip(range(steps), loader, strict=False):
                for index, key in zip(batch["index"].tolist(), batch["keys"], strict=True):
                    assert index not in keys
                    keys[index] = key
        done += steps * world * 4
    assert [keys[index] for index in range(done)] == whole[:done]


def test_more_readers_than_shards(kit, tmp_path):
    folder = kit.write_shards(tmp_path, [7])
    config = kit.stream_config(folder, workers=4, lanes=16)
    keys = []
    for rank in range(4):
        loader = iter(StreamLoader(config, Plan(config), kit.letters, batch_size=7, rank=rank, world=4))
        keys += [key for _ in range(3) for key in next(loader)["keys"]]
    assert len(keys) == 84 and set(Counter(keys).values()) == {12}


def test_dropout_crops_and_tags_depend_on_the_position_alone(kit, tmp_path):
    entries = []
    for number in range(20):
        entries.append((f"{number}.png", kit.coloured(number, width=40)))
        entries.append((f"{number}.txt", b"kept ||| a $$ b $$ c %% d $$ e"))
    kit.indexed(tmp_path / "a.tar", entries)
    config = kit.stream_config(tmp_path, captions=CaptionRules(drop=0.2, tags=TagGrammar()))
    first = [(s.key, s.caption, s.crop) for s in stream(config, kit.letters, stop=400)]
    again = [(s.key, s.caption, s.crop) for s in stream(config, kit.letters, start=123, stop=400)]
    assert first[123:] == again
    dropped = np.mean([caption == "" for _, caption, _ in first])
    assert abs(dropped - 0.2) < 4 * (0.16 / 400) ** 0.5
    lefts = Counter(crop[1] for _, _, crop in first)
    assert sorted(lefts) == list(range(25))
    assert all(crop[0] == 0 and crop[2:] == (16, 40) for _, _, crop in first)
    other = [(s.key, s.caption, s.crop) for s in stream(replace(config, seed=6), kit.letters, stop=400)]
    assert other != first


def test_captions_that_name_a_side_are_never_mirrored(kit, tmp_path):
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, 8:] = 255
    from PIL import Image

    picture = kit.encoded(Image.fromarray(half))
    entries = [
        ("side.png", picture),
        ("side.txt", b"white on the right"),
        ("free.png", picture),
        ("free.txt", b"white"),
    ]
    kit.indexed(tmp_path / "a.tar", entries)
    config = kit.stream_config(tmp_path, crop=CropRules(flip=True), captions=CaptionRules(drop=0.0))
    mirrored = {"side": [], "free": []}
    for sample in stream(config, kit.letters, stop=200):
        mirrored[sample.key.split("/")[1]].append(sample.image[0, 0, 0] == 255)
    assert not any(mirrored["side"])
    assert 25 < sum(mirrored["free"]) < 75


def test_limits_leave_samples_out_of_the_plan(kit, tmp_path):
    entries = [(f"{n}.png", kit.coloured(n, width=10 + n, height=10 + n)) for n in range(20)]
    kit.indexed(tmp_path / "a.tar", entries)
    config = kit.stream_config(tmp_path, crop=CropRules(min_size_px=15), captions=CaptionRules(allow_missing=True))
    assert Plan(config).samples == 15
    numbers = {number_of(sample.image) for sample in stream(config, kit.letters, stop=15)}
    assert numbers == set(range(5, 20))
    with pytest.raises(UserError, match="no sample of this source"):
        Plan(replace(config, crop=CropRules(min_size_px=1000)))


def test_buckets_give_batches_of_one_shape_and_each_sample_once(kit, tmp_path):
    entries = []
    shapes = [(16, 16)] * 40 + [(16, 30)] * 24 + [(60, 31)] * 17 + [(16, 70)] * 3
    for number, (height, width) in enumerate(shapes):
        entries += [(f"{number}.png", kit.coloured(number, width=width, height=height)), (f"{number}.txt", b"x")]
    for part in range(3):
        kit.write_tar(tmp_path / f"{part}.tar", entries[part * 56 : (part + 1) * 56])
    index_shards(tmp_path)
    crop = CropRules(buckets=Buckets(step_px=8, max_aspect=4.0, block=8))
    config = kit.stream_config(tmp_path, resolution=32, crop=crop)
    plan = Plan(config)
    assert sum(plan.shapes.values()) == 84 and len(plan.shapes) == 3
    found, used = {}, Counter()
    for world, workers in [(1, 0), (2, 2), (4, 1)]:
        for rank in range(world):
            loader = StreamLoader(
                replace(config, workers=workers),
                plan,
                kit.letters,
                batch_size=8 // world,
                rank=rank,
                world=world,
                start=8,
            )
            for _, batch in zip(range(40), loader, strict=False):
                shape = tuple(batch["image"].shape[2:])
                assert shape in plan.shapes
                for index, key, crop_numbers in zip(
                    batch["index"].tolist(), batch["keys"], batch["crop"].tolist(), strict=True
                ):
                    assert crop_numbers[2] == shape[0] or crop_numbers[3] == shape[1]
                    assert found.setdefault(index, (key, shape)) == (key, shape)
                used[shape] += 1
    assert set(used) == set(plan.shapes)
    in_order = [found[index][0] for index in range(8, 328)]
    assert max(Counter(in_order).values()) - min(Counter(in_order).values()) <= 2
    with pytest.raises(UserError, match="whole number of micro-batches") as caught:
        StreamLoader(config, plan, kit.letters, batch_size=3)
    assert caught.value.where == "data.crop.buckets"  # no key may set its block
    with pytest.raises(UserError, match="whole number of micro-batches"):
        StreamLoader(config, plan, kit.letters, batch_size=4, start=2)


def test_memory_cache_changes_nothing_but_the_speed(kit, tmp_path):
    folder = kit.write_shards(tmp_path, [23], width=50, height=20)
    config = kit.stream_config(folder, crop=CropRules(flip=True))
    plain = list(stream(config, kit.letters, stop=100))
    for limit in (1.0, 10 * 3 * 16 * 40 / 1e9):
        kept = list(stream(replace(config, memory_cache_gb=limit), kit.letters, stop=100))
        for one, other in zip(plain, kept, strict=True):
            assert (one.key, one.caption, one.crop) == (other.key, other.caption, other.crop)
            assert np.array_equal(one.image, other.image)
    (folder / "000.tar").unlink()
    held = list(stream(replace(config, memory_cache_gb=1.0), kit.letters, stop=30))
    assert all(sample.weight == 0 for sample in held)


def test_long_captions_are_cut_to_the_context(kit, shards):
    config = kit.stream_config(shards, context_length=4, captions=CaptionRules(drop=0.0))
    sample = next(stream(config, kit.letters))
    assert bytes(sample.tokens).decode() == "numb" and sample.length == 4


def test_places_are_looked_up_once_a_window(kit, shards, monkeypatch):
    """Lanes of several sources read more shards side by side than tables are kept, and a table costs much."""
    monkeypatch.setattr(reader, "LOCAL_SPAN", 0)
    monkeypatch.setattr(reader, "TABLES", 1)
    config = kit.stream_config(shards, window=8)
    plan, looked_up, table = Plan(config), [], ShardRecord.table
    monkeypatch.setattr(ShardRecord, "table", lambda self: looked_up.append(self.name) or table(self))
    samples = list(stream(config, kit.letters, stop=150, plan=plan))
    assert sum(sample.weight for sample in samples) == 150
    windows = {(window.pass_number, window.lane, window.number) for window in map(window_of(plan), range(150))}
    assert 0 < len(looked_up) <= len(windows)


def window_of(plan):
    return lambda position: plan.locate(position).window
