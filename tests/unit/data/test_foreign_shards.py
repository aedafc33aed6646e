"""Archives as other tools and people make them: what is left out is named with its reason and a hint that helps."""

import gzip
import io
import json
import lzma
import os
import random
import re
import shlex
import subprocess
import tarfile

import pytest
from PIL import Image

from hdm_lightning.cli.shards import main
from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.faults import FaultMeter
from hdm_lightning.data.index import load_index
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.datasets.img2dataset import downloads, index_img2dataset
from hdm_lightning.errors import UserError
from shard_contents import rejections


def told(capsys, *words):
    """Status and all that a command says."""
    status = main([str(word) for word in words])
    found = capsys.readouterr()
    return status, found.out + found.err


def pairs(kit, name, count=5):
    for number in range(count):
        yield name.format(number) + ".png", kit.coloured(number)
        yield name.format(number) + ".txt", f"number {number}".encode()


@pytest.mark.parametrize("name", ["shot 2024.05.{:02d}", "photo.v{}", "{}.image", "a/b.c/d.e.{}"])
def test_names_with_further_dots_are_told_and_the_hint_takes_them(kit, tmp_path, capsys, name):
    shard = kit.write_tar(tmp_path / "in" / "0.tar", pairs(kit, name))
    status, text = told(capsys, "index", tmp_path / "in")
    assert status == 2 and "5 unused members: with .png after a further dot" in text and "build folder" in text
    with tarfile.open(shard) as archive:
        archive.extractall(tmp_path / "pics", filter="data")
    assert main(["build", "folder", str(tmp_path / "pics"), "--out", str(tmp_path / "out"), "--processes", "1"]) == 0
    samples = list(stream(kit.stream_config(tmp_path / "out"), kit.letters, stop=5))
    assert sorted(int(sample.image[0, 0, 0]) for sample in samples) == list(range(5))
    status, text = told(capsys, "stats", tmp_path / "in")
    assert status == 2 and "hdm-shards stats" not in text and "none of" in text


@pytest.mark.parametrize("seed", range(4))
def test_members_that_are_not_side_by_side_are_told_and_sorting_mends_it(kit, tmp_path, capsys, seed):
    draw = random.Random(seed)
    keys = draw.sample(range(100), 6)
    entries = [entry for key in keys for entry in pairs(kit, f"{key:03d}{{}}", 1)]
    apart = sorted(entries, key=lambda entry: entry[0].endswith(".txt") == (seed % 2 == 0))
    kit.write_tar(tmp_path / "0.tar", apart)
    status, text = told(capsys, "index", tmp_path)
    assert status == 2 and "12 left out: members not side by side" in text and "tar --sort=name" in text
    kit.write_tar(tmp_path / "0.tar", sorted(entries))
    assert told(capsys, "index", tmp_path)[0] == 0 and load_index(tmp_path).samples == 6


@pytest.mark.parametrize(
    "later", [("a.cls", "b.cls"), ("a.webp",), ("a.json",), ("a.cls", "b.txt"), ("a.png", "a.txt")]
)
def test_members_that_come_later_take_no_whole_sample_away(kit, tmp_path, later):
    whole = [*pairs(kit, "a", 1), *pairs(kit, "b", 1)]
    (record,) = kit.indexed(tmp_path / "0.tar", whole + [(name, kit.coloured(9)) for name in later]).shards
    assert record.samples == 2 and not {0, 1} & record.skip.keys()
    assert set(record.skip.values()) == {"duplicate key"}


def test_a_sample_without_its_caption_is_told_apart_from_one_whose_caption_lies_elsewhere(kit, tmp_path):
    image, text = kit.coloured(1), b"x"
    entries = [
        ("a.png", image),
        ("b.png", image),
        ("c.cls", b"1"),
        ("d.png", image),
        ("a.txt", text),
        ("d.webp", image),
    ]
    (record,) = kit.indexed(tmp_path / "0.tar", entries).shards
    apart = {number for number, reason in record.skip.items() if "side by side" in reason}
    assert apart == {0, 4} and 1 not in record.skip and 3 not in record.skip and record.skip[5] == "duplicate key"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(b"x" * 2000, mtime=0), "gunzip"),
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>404</html>", "a page of HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\3\4" + bytes(100), "ZIP"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "Zstandard"),
    ],
)
def test_what_is_no_archive_is_called_by_its_name(kit, tmp_path, capsys, content, kind):
    kit.write_shards(tmp_path, [2])
    (tmp_path / "9.TAR").write_bytes(content)
    status, text = told(capsys, "index", tmp_path)
    assert (status == 0 and f"9.TAR: not a tar archive but {kind}" in text) or kind in text
    (tmp_path / "000.tar").unlink()
    status, text = told(capsys, "index", tmp_path)
    assert status == 2 and kind in text and "hint" in text


def test_folders_of_packed_hidden_and_linked_shards_say_what_there_is(kit, tmp_path, capsys):
    real = kit.write_shards(tmp_path / "real", [3])
    folder = tmp_path / "in"
    (folder / "00000.tar").mkdir(parents=True)
    (folder / "._0.tar").write_bytes(b"\0\5\x16\7")
    (folder / "x.tar.gz").write_bytes(gzip.compress((real / "000.tar").read_bytes()))
    (folder / "y.tgz").write_bytes(gzip.compress((real / "000.tar").read_bytes()))
    (folder / "z.tar.xz").write_bytes(lzma.compress((real / "000.tar").read_bytes()))
    status, text = told(capsys, "index", folder)
    assert status == 2 and "1 .tar.gz" in text and "hidden .tar" in text
    command = re.search(r"hint: unpack them: (.*)", text)[1]
    subprocess.run(["bash", "-c", command], check=True)
    assert told(capsys, "index", folder)[0] == 0 and load_index(folder).samples == 9
    linked = tmp_path / "linked"
    linked.mkdir()
    os.symlink(real, linked / "set")
    os.symlink(tmp_path, linked / "up")
    status, text = told(capsys, "index", linked)
    command = shlex.split(re.search(r"hint: hdm-shards (.*)", text)[1])
    assert status == 2 and told(capsys, *command)[0] == 0
    assert {"set/000.tar"} <= {shard.name for shard in load_index(linked).shards}


def test_links_and_other_members_are_counted(kit, tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in [("0.png", kit.coloured(1)), ("0.txt", b"x"), ("0.cls", b"3"), ("README", b"y")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("1.png")
            member.type, member.linkname = kind, "0.png"
            archive.addfile(member)
    status, text = told(capsys, "index", tmp_path)
    assert status == 0 and "1 samples in 1 shards, 0 left out" in text
    for line in (
        "2 unused members: links",
        "1 unused members: devices",
        "unused members: .cls",
        "without an extension",
    ):
        assert line in text
    assert load_index(tmp_path).shards == index_shards(tmp_path).shards


def test_shards_that_came_after_the_index_are_told_and_the_hint_takes_them(kit, tmp_path, capsys):
    folder = kit.write_shards(tmp_path / "my shards", [3])
    kit.write_tar(folder / "late" / "1.tar", kit.entries_of(10, 4))
    status, text = told(capsys, "stats", folder)
    command = shlex.split(re.search(r"not used .*: hdm-shards (.*)", text)[1])
    assert status == 0 and "1 shards are not in the index" in text
    assert told(capsys, *command)[0] == 0 and load_index(folder).samples == 7
    (folder / "index.json").unlink()
    (folder / "000.tar").unlink()
    status, text = told(capsys, "stats", folder)
    command = shlex.split(re.search(r"run `hdm-shards (.*)`", text)[1])
    assert status == 2 and told(capsys, *command)[0] == 0 and load_index(folder).samples == 4


@pytest.mark.parametrize(
    "stats", ["[]", "null", '{"count": null, "successes": []}', "{", "[" * 100_000, '{"count": "5"}']
)
def test_statistics_of_any_kind_are_passed_over(kit, tmp_path, stats):
    kit.write_tar(tmp_path / "00000.tar", kit.entries_of(0, 3))
    (tmp_path / "00001.tar").write_bytes(b"")
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 4, "successes": 3}))
    (tmp_path / "00001_stats.json").write_text(stats)
    assert index_img2dataset(tmp_path, processes=1).samples == 3
    assert downloads(tmp_path).counts == {"count": 4, "successes": 3}
    assert "00001.tar\tnot a tar archive but an empty file" in (tmp_path / "rejected.tsv").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("--short-side", "0"),
        ("--short-side", "-5"),
        ("--quality", "500"),
        ("--quality", "0"),
        ("--min-size", "-1"),
        ("--processes", "-1"),
        ("--samples-per-shard", "0"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, capsys, words):
    status = main(["build", "folder", str(tmp_path), "--out", str(tmp_path / "out"), *words])
    assert status == 2 and words[0] in capsys.readouterr().err


def test_a_sparse_archive_of_hundreds_of_megabytes_is_indexed_without_reading_them(kit, tmp_path):
    member = tarfile.TarInfo("huge.png")
    member.size = 400 << 20
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(member.tobuf())
        file.seek(400 << 20, os.SEEK_CUR)
        for name, data in kit.entries_of(1, 1):
            small = tarfile.TarInfo(name)
            small.size = len(data)
            file.write(small.tobuf() + data.ljust(-(-len(data) // 512) * 512, b"\0"))
        file.write(bytes(1024))
    (record,) = index_shards(tmp_path).shards
    assert record.samples == 1 and record.skip == {0: "sample too large"}


def test_a_stream_in_which_nothing_is_good_stops_at_once_and_says_what_to_do(kit, tmp_path):
    kit.indexed(tmp_path / "0.tar", [(f"{number}.png", kit.coloured(number)) for number in range(300)])
    config = kit.stream_config(tmp_path, max_bad_share=0.05, bad_patience=1000)
    with pytest.raises(UserError, match=r"64 of the last 64 .*no caption") as caught:
        list(stream(config, kit.letters, stop=10_000))
    assert "allow_missing=true" in caught.value.hint
    meter = FaultMeter(0.05, 1000)
    meter.count(None)
    for _ in range(50):  # one good sample: the share decides, after the patience
        meter.count("no caption")


def test_img2dataset_output_is_used_as_it_is(kit, tmp_path):
    """Laid out as img2dataset writes it: failed downloads have no member, records say what was downloaded."""
    entries = []
    for number in range(12):
        key = f"{number:09d}"
        record = {
            "caption": f"number {number}",
            "url": "u",
            "key": key,
            "status": "success",
            "width": 20,
            "sha256": "0",
        }
        image = Image.new("RGB", (20, 30), (number, 0, 77))
        entries += [
            (f"{key}.jpg", kit.encoded(image, "JPEG", quality=95)),
            (f"{key}.json", json.dumps(record).encode()),
            (f"{key}.txt", f"number {number}".encode()),
        ]
    kit.write_tar(tmp_path / "00000.tar", entries[:18])
    kit.write_tar(tmp_path / "00001.tar", [*entries[18:], ("000000012.jpg", b""), ("000000012.txt", b"x")])
    for shard, count in (("00000", 7), ("00001", 9)):
        stats = {"count": count, "successes": 6, "failed_to_download": count - 6, "duration": 1.5, "status_dict": {}}
        (tmp_path / f"{shard}_stats.json").write_text(json.dumps(stats))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    index = index_img2dataset(tmp_path, processes=1)
    assert index.samples == 12
    assert rejections(tmp_path) == {"00001.tar#6": "empty image"}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    told = downloads(tmp_path).counts
    assert (told["count"], told["successes"], told["failed_to_download"]) == (16, 12, 4)
    for rules in (CaptionRules(drop=0.0), CaptionRules(drop=0.0, prefer="json")):
        samples = list(stream(kit.stream_config(tmp_path, captions=rules), kit.letters, stop=12))
        assert sorted(sample.caption for sample in samples) == sorted(f"number {n}" for n in range(12))
    with pytest.raises(UserError, match="output_format=webdataset"):
        index_img2dataset(tmp_path / "nothing")
