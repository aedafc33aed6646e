"""Anything at all as shards, folders and images: no traceback, no hang, and every file is used or named.

Each input follows from its number alone. The slow tier tries five times as many.
"""

import json
import random
import time

import pytest

from hdm_lightning.data.captions import CaptionRules, clean, parse_record, text_of
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.decode import decode, load_upright, upright_size
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.data.tar import split_name
from hdm_lightning.data.verification import verify
from hdm_lightning.datasets.folder import build_folder
from hdm_lightning.datasets.img2dataset import downloads, index_img2dataset
from hdm_lightning.datasets.kohya import build_kohya
from hdm_lightning.datasets.source_files import look_into
from hdm_lightning.errors import UserError
from odd_inputs import some_archive, some_caption, some_folder, some_image, some_record

FEW = [pytest.param(range(110)), pytest.param(range(110, 600), marks=pytest.mark.slow)]
MOST_SECONDS = 10


def is_quick(begin):
    return time.process_time() - begin < MOST_SECONDS


@pytest.mark.parametrize("numbers", FEW)
def test_shards_of_all_kinds_are_indexed_verified_and_streamed(kit, tmp_path, numbers):
    used = whole = 0
    for number in numbers:
        draw, folder = random.Random(f"shard {number}"), tmp_path / str(number)
        kit.write_tar(folder / "good.tar", kit.entries_of(0, 3))
        data, names = some_archive(draw)
        (folder / "odd.tar").write_bytes(data)
        begin = time.process_time()
        good, odd = index_shards(folder).shards
        assert good.samples == 3, number
        counted = odd.count + sum(odd.others.values())
        assert counted or odd.note, number
        if names is not None:
            whole += 1
            keys = {split_name(name)[0] for name in names if split_name(name) is not None}
            others = sum(split_name(name) is None for name in names)
            assert odd.count >= len(keys) and odd.others.get("without an extension, or hidden", 0) == others, number
            assert odd.samples == odd.count - len(odd.skip) and all(odd.skip.values()), number
        assert all(str(problem) for problem in verify(folder, decode=True)), number
        config = kit.stream_config(folder, quarantine=str(folder / "quarantine.jsonl"))
        samples = list(stream(config, kit.letters, stop=3 + odd.samples))
        used += sum(sample.weight for sample in samples)
        holes = {sample.key for sample in samples if not sample.weight}
        file = folder / "quarantine.jsonl"
        named = file.read_text().splitlines() if file.exists() else []
        assert len(named) >= len(holes) and all(json.loads(line)["reason"] for line in named), number
        undamaged = [sample for sample in samples if sample.key.startswith("good.tar")]
        assert len({sample.key for sample in undamaged}) == 3 and all(each.weight for each in undamaged), number
        assert is_quick(begin), number
    assert whole > 0.3 * len(numbers) and used > 3.3 * len(numbers)


@pytest.mark.parametrize("numbers", FEW)
def test_folders_of_all_kinds_are_built_with_every_file_used_or_named(kit, tmp_path, numbers):
    built = 0
    for number in numbers:
        draw, root, out = random.Random(f"folder {number}"), tmp_path / f"{number}/in", tmp_path / f"{number}/out"
        root.mkdir(parents=True)
        names, builder = some_folder(draw, root), draw.choice((build_folder, build_kohya))
        options, begin = {"processes": 1, "allow_missing": draw.random() < 0.5}, time.process_time()
        try:
            report = builder(root, out, **options)
        except UserError as error:
            assert error.hint and len(str(error)) < 3000, number
            continue
        built += 1
        found = look_into(root, ("txt", "caption"))
        there = {image.name for image in found.images} | {text for image in found.images for text in image.texts}
        there |= {name for name, _ in found.unused}
        lost = {name for name in names if not any(name == each or name.startswith(f"{each}/") for each in there)}
        assert not lost, (number, lost)
        left = {name for name, reason in report.unused if "0 repeats" in reason} | {name for name, _ in report.rejected}
        assert report.images + len({each.name for each in found.images} & left) == len(found.images), number
        lines = (out / "rejected.tsv").read_bytes().decode().split("\n")[:-1]
        assert len(lines) == len(report.rejected) + len(report.unused), number
        assert not any(letter < " " for line in lines for letter in line.replace("\t", "")), number
        rules = {"captions": CaptionRules(allow_missing=True), "crop": CropRules(max_aspect=1e9)}
        samples = list(stream(kit.stream_config(out, **rules), kit.letters, stop=5))
        assert all(sample.weight for sample in samples), (number, {sample.fault for sample in samples})
        assert builder(root, out, **options) == report, number
        assert is_quick(begin), number
    assert built > 0.5 * len(numbers)


@pytest.mark.parametrize("numbers", FEW)
def test_images_of_all_kinds_are_used_or_faults(numbers):
    good = 0
    for number in (each * 5 + more for each in numbers for more in range(5)):
        draw = random.Random(f"image {number}")
        data, begin = some_image(draw), time.process_time()
        try:
            height, width = upright_size(data)
            assert load_upright(data).size == (width, height), number
            pixels, crop = decode(data, lambda *size: CropRules(max_aspect=1e9).choose(*size, (8, 8), Draws(0)))
            assert pixels.shape == (3, 8, 8) and min(crop.full_height, crop.full_width) == 8, number
            good += 1
        except SampleFault as fault:
            assert str(fault), number
        assert is_quick(begin), number
    assert good > 2 * len(numbers)


@pytest.mark.parametrize("numbers", FEW)
def test_captions_and_records_of_all_kinds_are_read_or_faults(numbers):
    read, begin = 0, time.process_time()
    for number in (each * 10 + more for each in numbers for more in range(10)):
        draw = random.Random(f"caption {number}")
        members = {"txt": some_caption(draw)} if draw.random() < 0.6 else {}
        if draw.random() < 0.6:
            members["json"] = some_record(draw)
        for rules in (CaptionRules(), CaptionRules(prefer="json", allow_missing=True)):
            try:
                text = rules.first(members)
                text.encode("utf-8")
                assert clean(text) == text, number
                read += 1
            except SampleFault as fault:
                assert str(fault), number
        for parse in (parse_record, text_of):
            try:
                parse(members.get("json", b""))
            except SampleFault as fault:
                assert str(fault), number
    assert is_quick(begin) and read > 4 * len(numbers)


@pytest.mark.parametrize("numbers", FEW)
def test_downloads_of_all_kinds_are_indexed(tmp_path, numbers):
    for number in numbers:
        draw, root = random.Random(f"download {number}"), tmp_path / str(number)
        root.mkdir()
        for shard in range(draw.randrange(3)):
            (root / f"{shard:05d}.tar").write_bytes(some_archive(draw)[0])
            (root / f"{shard:05d}_stats.json").write_bytes(some_record(draw))
        (root / "._00000.tar").write_bytes(b"\0\5\x16\7" + bytes(90))
        try:
            index = index_img2dataset(root, processes=1)
            assert "._00000.tar" not in {shard.name for shard in index.shards}, number
        except UserError as error:
            assert error.hint, number
        downloads(root)
