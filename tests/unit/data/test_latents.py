"""Latents on disk: the same samples in the same order as the images give, cut on the grid; encoding that goes on."""

import json
import os
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load

from hdm_lightning import XUT, FlowModule, ShardDataModule, load_autoencoder, load_text_encoder
from hdm_lightning.cli.encode_shards import _formats, start
from hdm_lightning.cli.shards import COMMANDS, main, parser
from hdm_lightning.data import scanning
from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.decode import decode
from hdm_lightning.data.index import load_index
from hdm_lightning.data.latent_sets import LatentFormat, pack_latent, unpack_latent
from hdm_lightning.data.loader import StreamLoader, largest_sample_bytes
from hdm_lightning.data.randomness import Draws
from hdm_lightning.data.reader import Reader
from hdm_lightning.data.rules import Source
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards, scan_shard
from hdm_lightning.data.verification import verify
from hdm_lightning.datasets import encoding, shard_work
from hdm_lightning.datasets.encoding import EncodedSet, EncodeOptions
from hdm_lightning.datasets.shard_work import require_room
from hdm_lightning.encoders.autoencoder import MAX_PIXELS
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from shard_contents import digests

FACTOR = 4
HALF = 2.0**-11  # of rounding to float16, relative


def noise_picture(number):
    """A picture of varied shape, whose sides seldom divide by anything, with something in every place."""
    random = np.random.default_rng(number)
    height, width = random.integers(20, 70, size=2)
    coarse = Image.fromarray(random.integers(0, 255, size=(6, 6, 3), dtype=np.uint8))
    return coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def images(kit, tmp_path_factory):
    """30 samples in three shards, one of them of unreadable pixels, one left out by the index, one very long."""
    folder, number = tmp_path_factory.mktemp("images"), 0
    for shard, count in enumerate((13, 1, 16)):
        entries = []
        for _ in range(count):
            picture = noise_picture(number)
            picture = picture.resize((400, 20)) if number == 20 else picture
            data = kit.encoded(picture)
            data = data[: len(data) // 2] if number == 4 else b"" if number == 7 else data
            entries += [
                (f"sub/{number:04d}.png", data),
                (f"sub/{number:04d}.txt", f"number {number}".encode()),
                (f"sub/{number:04d}.json", json.dumps({"number": number, "tags": ["a", "ß"]}).encode()),
            ]
            number += 1
        kit.write_tar(folder / f"{shard:03d}.tar", entries)
    index_shards(folder)
    return folder


@pytest.fixture(scope="module")
def encoded(images, tiny_autoencoder, tmp_path_factory):
    """Sets of latents of 16 and 24 px, made by the command."""
    out = tmp_path_factory.mktemp("latents") / "out"
    command = ["encode", str(images), "--out", str(out), "--vae", str(tiny_autoencoder), "--resolution", "24", "16"]
    assert main([*command, "--devices", "cpu", "--std"]) == 0
    return out


@pytest.fixture(scope="module")
def vae(tiny_autoencoder):
    return load_autoencoder(str(tiny_autoencoder))


def config_of(kit, *folders, **options):
    return kit.stream_config(*folders, captions=CaptionRules(drop=0.2), **options)


def test_shards_have_the_same_keys_and_texts_in_the_same_order(images, encoded):
    for record in load_index(encoded / "16px").shards:
        with tarfile.open(images / record.name) as before, tarfile.open(encoded / "16px" / record.name) as after:
            known = {name: before.extractfile(name).read() for name in before.getnames()}
            for name in after.getnames():
                if not name.endswith(".latent.safetensors"):
                    assert after.extractfile(name).read() == known.pop(name)
            kept = [name for name in before.getnames() if name.endswith(".png") and name not in known]
            assert not kept
            keys = [name.partition(".")[0] for name in after.getnames() if "latent" in name]
            assert keys == [
                name[:8] for name in before.getnames() if name.endswith("png") and name[4:8] not in LEFT_OUT
            ]


LEFT_OUT = ("0007", "0020")  # by the index of the images; by the longest aspect


@pytest.mark.parametrize("world", [1, 3])
def test_positions_keys_captions_and_draws_are_those_of_the_images(kit, images, encoded, world):
    """Order, keys, captions, holes are equal; the crop is the one that the same draw chooses on the grid."""
    online, cached = config_of(kit, images), config_of(kit, encoded)
    for rank in range(world):
        way = {"rank": rank, "world": world, "start": 5, "stop": 70}
        pairs = zip(stream(online, kit.letters, **way), stream(cached, kit.letters, **way), strict=True)
        for seen, stored in pairs:
            assert (stored.index, stored.key, stored.caption, stored.tokens) == (
                seen.index,
                seen.key,
                seen.caption,
                seen.tokens,
            )
            assert stored.weight == seen.weight == (0.0 if seen.key.endswith("0004") else 1.0)
            assert stored.image.shape == (2, 4, 4, 4) and stored.image.dtype == np.float16
            if not seen.weight:
                continue
            top, left, full_height, full_width = stored.crop
            assert (full_height, full_width) == seen.crop[2:]
            draws = Draws(online.seed, online.stage, seen.index, "crop")
            wanted = [FACTOR * draws.below(int(full - 16) // FACTOR + 1) for full in (full_height, full_width)]
            assert [top, left] == wanted
            assert max(abs(top - seen.crop[0]), abs(left - seen.crop[1])) <= FACTOR


def test_a_cut_is_that_part_of_the_whole_image_encoded_online(kit, images, encoded, vae):
    """Equal to half precision: the crop cut from disk, and the whole resized image encoded now and cut in memory."""
    config, plan = config_of(kit, encoded, resolution=24), Plan(config_of(kit, encoded, resolution=24))
    source = Plan(config_of(kit, images, resolution=24))
    reader = Reader(source, config)
    borders, interiors = [], []
    for sample in stream(config, kit.letters, stop=27, plan=plan):
        if not sample.weight:
            continue
        raw = reader.read(source.locate(sample.index))
        pixels, _ = decode(raw.image(), plan.latents.whole)
        whole = vae.moments(signed(pixels))[0].numpy()
        (top, left), (height, width) = (int(side) for side in sample.crop[:2]), sample.image.shape[-2:]
        assert top % FACTOR == left % FACTOR == 0
        rows, columns = slice(top // FACTOR, top // FACTOR + height), slice(left // FACTOR, left // FACTOR + width)
        wanted = whole[:, :, rows, columns]
        np.testing.assert_allclose(sample.image, wanted, rtol=2 * HALF, atol=1e-6)
        alone = vae.moments(signed(pixels[:, top : top + 24, left : left + 24]))[0, 0].numpy()
        difference = np.abs(alone - wanted[0]) / wanted[0].std()
        interiors.append(difference[:, 2:-2, 2:-2].mean())
        borders.append(difference.mean())
    print(
        f"mean difference from a crop encoded alone, in standard deviations: {np.mean(borders):.4f} all cells, "
        f"{np.mean(interiors):.4f} two cells from the border"
    )
    assert len(borders) > 20 and np.mean(borders) > 2 * HALF  # it is there, and no rounding


def signed(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels))[None].float().div_(127.5).sub_(1.0)


def test_moments_give_what_encoding_gives(vae):
    image = torch.rand(3, 3, 16, 24) * 2 - 1
    noise = torch.randn(3, 4, 4, 6)
    moments = vae.moments(image)
    assert torch.equal(vae.from_moments(moments), vae.encode(image))
    assert torch.equal(vae.from_moments(moments, noise=noise), vae.encode(image, noise=noise))
    half = vae.from_moments(moments.half())
    torch.testing.assert_close(half, vae.encode(image), rtol=2 * HALF, atol=1e-5)


def test_the_rest_of_the_long_side_is_cut_and_positions_keep_it(encoded):
    form = load_index(encoded / "16px").latents
    whole = form.whole(30, 61)
    assert (whole.full_height, whole.full_width) == (16, 33)
    assert (whole.height, whole.width) == (16, 32)
    centre = CropRules(centre=True).choose(30, 61, (16, 16), Draws(), grid=FACTOR)
    assert (centre.top, centre.left, centre.full_width) == (0, 8, 33)


def test_every_place_of_the_grid_is_drawn_alike():
    """Also the last one, which a pixel offset rounded down would seldom reach."""
    rules, counts = CropRules(), np.zeros(5, dtype=int)
    for index in range(2000):
        counts[rules.choose(16, 35, (16, 16), Draws("crop", index), grid=FACTOR).left // FACTOR] += 1
    assert counts.min() > 330 and counts.sum() == 2000


def test_a_member_is_an_ordinary_file_of_tensors(encoded):
    with tarfile.open(encoded / "16px" / "000.tar") as tar:
        good, bad = (load(tar.extractfile(f"sub/{key}.latent.safetensors").read()) for key in ("0000", "0004"))
    assert good["mean"].dtype == good["std"].dtype == np.float16 and good["std"].min() > 0
    assert good["mean"].shape == good["std"].shape and set(bad) == {"original_size"}
    assert good["original_size"].tolist() == list(noise_picture(0).size[::-1])
    size, moments = unpack_latent(pack_latent(3, 5, np.ones((2, 4, 1, 2))))
    assert size == (3, 5) and moments.shape == (2, 4, 1, 2)


def test_an_interrupted_encoding_goes_on_and_gives_the_same_bytes(images, encoded, tiny_autoencoder, tmp_path):
    """Killed while the second shard is written: one whole shard is there, no part of another, and the rest follows."""
    (form,) = _formats(str(tiny_autoencoder), [16], 2)
    pid = os.fork()
    if pid == 0:
        write, written = encoding.write_shard, []

        def dying(path, samples, **options):
            if written:
                (path.parent / f".{path.name}.0123.tmp").write_bytes(b"half a shard")
                os._exit(9)
            written.append(path)
            write(path, samples, **options)

        encoding.write_shard = dying
        torch.set_num_threads(1)
        EncodedSet(str(images), tmp_path, form, options_for(tiny_autoencoder)).make()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert list(digests(tmp_path / "16px")) == ["000.tar"]
    first = (tmp_path / "16px" / "000.tar").stat().st_mtime_ns
    for read in (load_index, index_shards):
        for folder in (tmp_path, tmp_path / "16px")[read is index_shards :]:
            assert "hdm-shards encode" in refused(partial(read, folder)).hint
    again = EncodedSet(str(images), tmp_path, form, options_for(tiny_autoencoder))
    assert [shard.record.name for shard in again.missing()] == ["001.tar", "002.tar"]
    seen = []
    index = again.make(seen.append)
    assert digests(tmp_path / "16px") == digests(encoded / "16px")
    assert index.shards == load_index(encoded / "16px").shards
    assert (tmp_path / "16px" / "000.tar").stat().st_mtime_ns == first
    assert seen == [13, 28]  # after the second shard and the third, of all samples
    assert not list((tmp_path / "16px").glob("*.tmp"))


def options_for(folder, **options):
    return EncodeOptions(partial(start, str(folder), "float32", MAX_PIXELS), MAX_PIXELS, **options)


def test_the_index_is_written_once_in_the_order_of_the_source(images, tiny_autoencoder, tmp_path, monkeypatch):
    """A crash just before it, or just after it, leaves no index of another order."""
    (form,) = _formats(str(tiny_autoencoder), [16])
    written, write = [], scanning.write_index
    monkeypatch.setattr(scanning, "write_index", lambda index, path: written.append(index) or write(index, path))
    place = f"{images}/{{002,000,001}}.tar"
    index = EncodedSet(place, tmp_path, form, options_for(tiny_autoencoder)).make()
    names = ["002.tar", "000.tar", "001.tar"]
    assert [[record.name for record in each.shards] for each in written] == [names]
    assert [record.name for record in index.shards] == names == [r.name for r in load_index(tmp_path / "16px").shards]


def test_shards_of_one_name_in_two_folders_are_refused(images, tiny_autoencoder, tmp_path):
    for folder in "ab":
        shutil.copytree(images, tmp_path / folder)
    (form,) = _formats(str(tiny_autoencoder), [16], 2)
    place = f"{tmp_path}/{{a,b}}/001.tar"
    error = refused(lambda: EncodedSet(place, tmp_path / "out", form, options_for(tiny_autoencoder)))
    assert error.where == place and "a/001.tar" in str(error) and "b/001.tar" in str(error)
    apart = EncodedSet(f"{tmp_path}/{{a/000,b/001}}.tar", tmp_path / "out", form, options_for(tiny_autoencoder))
    assert apart.samples == 13


def test_the_mean_alone_is_the_same_mean_in_half_the_room(kit, images, encoded, tiny_autoencoder, tmp_path):
    (form,) = _formats(str(tiny_autoencoder), [24], 1)
    options = options_for(tiny_autoencoder)
    mean_only = EncodedSet(str(images), tmp_path, form, options)
    foretold, both = mean_only.forecast().bytes, sum(each.bytes for each in load_index(encoded / "24px").shards)
    there = sum(record.bytes for record in mean_only.make().shards)
    assert 0.9 * there < foretold < 1.3 * there and there < both
    whole = stream(config_of(kit, encoded, resolution=24), kit.letters, stop=30)
    for part, sample in zip(stream(config_of(kit, tmp_path, resolution=24), kit.letters, stop=30), whole, strict=True):
        assert np.array_equal(part.image, sample.image[:1]) and part.crop == sample.crop
    with pytest.raises(UserError):
        EncodedSet(str(images), tmp_path, replace(form, moments=2), options)


def test_two_processes_give_the_same_bytes(images, encoded, tiny_autoencoder, tmp_path):
    (form,) = _formats(str(tiny_autoencoder), [16], 2)
    EncodedSet(str(images), tmp_path, form, options_for(tiny_autoencoder, devices=("cpu", "cpu"))).make()
    assert digests(tmp_path / "16px") == digests(encoded / "16px")


def test_bytes_that_are_not_those_indexed_leave_a_hole_where_they_leave_one_online(
    kit, images, tiny_autoencoder, tmp_path
):
    source = tmp_path / "images"
    shutil.copytree(images, source)
    table = load_index(source).shards[2].table()
    with (source / "002.tar").open("r+b") as file:
        file.seek(int(table.start[3]) + 600)
        file.write(b"rotten")
    (form,) = _formats(str(tiny_autoencoder), [16], 2)
    EncodedSet(str(source), tmp_path / "out", form, options_for(tiny_autoencoder)).make()
    pairs = list(
        zip(
            stream(config_of(kit, source), kit.letters, stop=28),
            stream(config_of(kit, tmp_path / "out"), kit.letters, stop=28),
            strict=True,
        )
    )
    assert [(one.key, one.weight) for one, _ in pairs] == [(other.key, other.weight) for _, other in pairs]
    assert [one.key for one, _ in pairs if not one.weight and "#" in one.key] == ["002.tar/#3"]
    faults = [json.loads(line) for line in (tmp_path / "out" / "16px" / "faults.jsonl").read_text().splitlines()]
    assert sorted((fault["key"], fault["ordinal"]) for fault in faults) == [("#3", 3), ("sub/0004", 4)]


def test_a_mistake_in_one_of_several_processes_is_told(images, tmp_path):
    options = options_for("/nowhere", devices=("cpu", "cpu"))
    form = LatentFormat(16, 4, 4, "0" * 32, "/nowhere")
    with pytest.raises(UserError, match="/nowhere") as caught:
        EncodedSet(str(images), tmp_path, form, options).make()
    assert caught.value.where == "--vae" and caught.value.hint


def test_the_index_can_be_made_anew(encoded, tmp_path):
    before = load_index(encoded / "16px")
    again = index_shards(encoded / "16px")
    assert (again.shards, again.latents) == (before.shards, before.latents)
    assert [str(problem) for problem in verify(encoded / "16px", decode=True)] == [
        "000.tar sample 4 (sub/0004): no latent: the image could not be encoded"
    ]
    assert scan_shard(encoded / "16px", "000.tar") == before.shards[0]


def test_the_forecast_is_near_what_is_written(images, tiny_autoencoder, encoded):
    (form,) = _formats(str(tiny_autoencoder), [24], 2)
    foretold = EncodedSet(str(images), encoded.parent / "no", form, options_for(tiny_autoencoder)).forecast()
    there = sum(record.bytes for record in load_index(encoded / "24px").shards)
    assert foretold.samples == 28 and 0.9 * there < foretold.bytes < 1.3 * there


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_work.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert require_room(tmp_path / "a" / "b", 10**9) == 10**9
    with pytest.raises(UserError, match=r"2\.0 GB more, but only 1\.0 GB are free"):
        require_room(tmp_path, 2 * 10**9)


def refused(function):
    with pytest.raises(UserError) as caught:
        function()
    assert caught.value.where and caught.value.hint
    return caught.value


def test_the_memory_of_a_sample_is_that_of_its_latent(kit, encoded):
    config = config_of(kit, encoded, resolution=16)
    plan = Plan(config)
    batch = next(iter(StreamLoader(config, plan, kit.letters, batch_size=1)))
    assert largest_sample_bytes(config, plan) == batch["latent"].nbytes


def test_what_latents_cannot_give_is_refused(kit, images, encoded, tmp_path):
    plain = {"train": str(encoded), "resolution": 16, "batch_size": 2, "tokenizer": kit.letters}
    cases = {
        "data.crop.flip": {"crop": {"flip": True}},
        "data.crop.buckets": {"crop": {"buckets": {"step_px": 4}}, "batch_size": 4, "samples_per_step": 4},
        str(encoded): {"resolution": 32},
        "data.resolution": {"train": str(encoded / "24px")},
        "data.train": {"train": [{"urls": str(encoded)}, {"urls": str(images)}]},
    }
    for where, changes in cases.items():
        module = ShardDataModule(**{**plain, **changes}, validation_samples=0, num_workers=0, lanes=4)
        assert refused(module.prepare).where == where
    missing = refused(lambda: Plan(config_of(kit, encoded, resolution=32)))
    assert "16 px, 24 px" in str(missing)
    assert refused(lambda: main_of(["index", str(encoded)]))
    form, options = load_index(encoded / "16px").latents, options_for("nowhere")
    assert refused(lambda: EncodedSet(str(encoded / "16px"), tmp_path, form, options))


def test_sets_that_differ_are_told_in_what(kit, encoded, tmp_path):
    """What an autoencoder was called tells none apart; each other field is named, with what mends it."""
    form = load_index(encoded / "16px").latents

    def mixture_with(**changes):
        other = tmp_path / "-".join(changes)
        shutil.copytree(encoded / "16px", other)
        (other / "latents.json").write_text(json.dumps({**replace(form, **changes).to_json(), "shards": 3}))
        index_shards(other)
        return Plan(kit.stream_config(sources=(Source((str(encoded / "16px"),)), Source((str(other),)))))

    assert mixture_with(name="elsewhere/vae").latents == form
    mean_only = refused(partial(mixture_with, moments=1))
    assert "differ in moments (" in str(mean_only) and "--std" in mean_only.hint
    assert "moments 1" in str(mean_only) and "autoencoder" not in mean_only.hint
    foreign = refused(partial(mixture_with, autoencoder="0" * 32, channels=16))
    assert "differ in channels, autoencoder (" in str(foreign) and "autoencoder" in foreign.hint
    assert "--std" not in foreign.hint


def main_of(words):
    arguments = parser().parse_args(words)
    return COMMANDS[arguments.command][2](arguments)


def test_another_encoding_in_the_folder_is_refused(images, encoded, tiny_autoencoder, tmp_path):
    form = load_index(encoded / "16px").latents
    EncodedSet(str(images), encoded, form, options_for(tiny_autoencoder))  # the same: goes on
    for changed, options in (
        (replace(form, autoencoder="0" * 32), {}),
        (form, {"dtype": "bfloat16"}),
        (form, {"max_aspect": 2.0}),
    ):
        chosen = options_for(tiny_autoencoder, **options)
        error = refused(partial(EncodedSet, str(images), encoded, changed, chosen))
        assert error.where == str(encoded / "16px")
        begun = tmp_path / "begun" / "16px"  # and ended before the first shard, as by numbers that are not finite
        begun.mkdir(parents=True, exist_ok=True)
        shutil.copy(encoded / "16px" / "latents.json", begun)
        second = EncodedSet(str(images), begun.parent, changed, chosen)
        assert second.missing()
        shutil.copy(next((encoded / "16px").glob("*.tar")), begun)  # the first has gone on meanwhile
        assert refused(second.make).where == str(begun)
        shutil.rmtree(begun)


def test_auto_is_noted_as_the_dtype_that_it_stands_for(images, encoded, tiny_autoencoder, monkeypatch):
    """A set begun with `auto` goes on with what that stood for, not with `auto` on a device where it is another."""
    words = ["encode", str(images), "--out", str(encoded), "--vae", str(tiny_autoencoder), "--resolution", "16"]
    words += ["--std"]
    assert main_of([*words, "--devices", "cpu", "--dtype", "float32"]) == 0
    assert refused(partial(main_of, [*words, "--devices", "cpu", "--dtype", "bfloat16"])).where == str(encoded / "16px")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    assert refused(partial(main_of, [*words, "--devices", "auto"])).where == str(encoded / "16px")


def test_a_fingerprint_is_of_the_encoder_alone(tiny_autoencoder, tmp_path):
    plain = load_autoencoder(str(tiny_autoencoder))
    half = load_autoencoder(str(tiny_autoencoder), dtype="bfloat16", mean=[1.0] * 4, std=[2.0] * 4)
    plain.save(tmp_path / "copy")
    assert plain.fingerprint == half.fingerprint == load_autoencoder(str(tmp_path / "copy")).fingerprint
    for name, same in (("decoder.conv_in.weight", True), ("encoder.conv_in.weight", False)):
        other = load_autoencoder(str(tiny_autoencoder))
        other.source = None
        with torch.no_grad():
            other.model.get_parameter(name).view(-1)[0] += 0.5
        assert (other.fingerprint == plain.fingerprint) == same


def test_batches_hold_latents_and_the_fingerprint(kit, encoded, vae):
    module = kit.data_module(encoded, batch_size=4, validation_samples=6)
    batch, checked = next(iter(module.train_dataloader())), list(module.val_dataloader())
    assert "image" not in batch and batch["latent"].shape == (4, 2, 4, 4, 4) and batch["latent"].dtype == torch.float16
    assert batch["autoencoder"] == vae.fingerprint and {each["autoencoder"] for each in checked} == {vae.fingerprint}
    assert sum(each["weight"].sum() for each in checked) in (5, 6)
    workers = next(iter(kit.data_module(encoded, batch_size=4, num_workers=2).train_dataloader()))
    assert torch.equal(workers["latent"], batch["latent"]) and torch.equal(workers["crop"], batch["crop"])


def test_a_module_refuses_latents_of_another_autoencoder(kit, encoded, tiny_autoencoder, tiny_text_encoder):
    network = XUT(XUTConfig(4, 1, 32, 48, 2, 16, 16, depth=1))
    other = load_autoencoder(str(tiny_autoencoder))
    module = FlowModule(network, load_text_encoder(str(tiny_text_encoder)), other, learning_rate=0.1)
    (batch, *_) = kit.data_module(encoded, batch_size=2, validation_samples=4).val_dataloader()
    assert module.with_draws(batch, validation=True)["noise"].shape == (2, 4, 4, 4)
    other.source = None
    del other.__dict__["fingerprint"]
    with torch.no_grad():
        other.model.encoder.conv_in.weight.mul_(2)
    assert refused(lambda: module.with_draws(batch, validation=True)).where == "vae.name"
