"""Builders from picture files: what they take, refuse, write, and how they go on after an interruption."""

import errno
import io
import json
import os
import tarfile
from functools import partial

import numpy as np
import pytest
import webdataset
from PIL import Image

from hdm_lightning.cli import shards as shards_command
from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index import load_index
from hdm_lightning.data.samples import stream
from hdm_lightning.data.verification import Problem, leave_out
from hdm_lightning.datasets import build as shard_build
from hdm_lightning.datasets.folder import build_folder
from hdm_lightning.datasets.journal import Journal
from hdm_lightning.datasets.shard_work import alone_in
from hdm_lightning.datasets.source_images import ImageOptions, image_field
from hdm_lightning.errors import UserError
from shard_contents import rejections


@pytest.fixture
def pictures(kit, tmp_path):
    """23 good pictures in folders, and seven that must be refused."""
    root = tmp_path / "pictures"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for number in range(23):
        path = root / ("deep/er" if number % 3 else "") / f"img.v2 {number:02d}.png"
        path.write_bytes(kit.coloured(number, width=30, height=20))
        if number % 2:
            path.with_suffix(".txt").write_text(f"number {number}")
        else:
            path.with_suffix(".json").write_text(json.dumps({"caption": f"number {number}", "artist": "x"}))
    (root / ".hidden" / "x.png").write_bytes(kit.coloured(1))
    bad = {
        "nocaption.png": (kit.coloured(0), None),
        "empty.png": (b"", b"caption"),
        "broken.jpg": (b"\xff\xd8 nothing", b"caption"),
        "cut.png": (kit.coloured(0)[:50], b"caption"),
        "latin.png": (kit.coloured(0), b"caf\xe9"),
        "blank.png": (kit.coloured(0), b"  "),
        "text.webp": (b"not a picture", b"caption"),
    }
    for name, (data, caption) in bad.items():
        (root / name).write_bytes(data)
        if caption is not None:
            (root / name).with_suffix(".txt").write_bytes(caption)
    (root / "notes.txt").write_text("no picture")
    return root


def test_a_folder_becomes_shards_and_each_rejected_file_has_its_line(kit, pictures, tmp_path):
    out = tmp_path / "out"
    report = build_folder(pictures, out, samples_per_shard=8, processes=1)
    assert report.samples == 23 and load_index(out).samples == 23
    reasons = rejections(out)
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == {
        "nocaption.png": "no caption",
        "empty.png": "empty image",
        "broken.jpg": "undecodable image",
        "cut.png": "undecodable image",
        "latin.png": "caption is not UTF-8",
        "blank.png": "no caption (in blank.txt)",
        "text.webp": "undecodable image",
        ".hidden": "hidden, or written by the system",
        "notes.txt": "a caption or record without an image",
    }
    config = kit.stream_config(out, captions=CaptionRules(drop=0.0))
    samples = list(stream(config, kit.letters, stop=23))
    assert sorted(int(sample.image[0, 0, 0]) for sample in samples) == list(range(23))
    for sample in samples:
        assert sample.caption == f"number {sample.image[0, 0, 0]}" and sample.crop[2:] == (16, 24)
    theirs = list(webdataset.WebDataset(f"{out}/shard-{{00000..00003}}.tar", shardshuffle=False))
    assert sorted(sample["__key__"] for sample in theirs) == sorted(sample.key.split("/")[1] for sample in samples)
    with tarfile.open(out / "shard-00000.tar") as archive:
        names = archive.getnames()
        record = json.loads(archive.extractfile(next(name for name in names if name.endswith(".json"))).read())
    assert record["source"].endswith(".png")


def test_builds_are_the_same_in_parallel_and_byte_for_byte(pictures, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        build_folder(pictures, tmp_path / out, samples_per_shard=8, processes=processes)
    for path in sorted((tmp_path / "one").iterdir()):
        other = (tmp_path / "two" / path.name).read_bytes()
        if path.name == "build.jsonl":  # rows come in the order of their shards
            assert sorted(path.read_bytes().splitlines()) == sorted(other.splitlines())
        else:
            assert path.read_bytes() == other, path.name


def test_an_interrupted_build_goes_on(pictures, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    build_folder(pictures, whole, samples_per_shard=8, processes=1)
    made, true_write = [], shard_build.write_shard

    def failing(path, samples):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        true_write(path, samples)

    monkeypatch.setattr(shard_build, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        build_folder(pictures, out, samples_per_shard=8, processes=1)
    assert not (out / "index.json").exists()
    with (out / "build.jsonl").open("a") as journal:
        journal.write('{"shard": "shard-0000')  # killed while writing a line
    made.clear()
    monkeypatch.setattr(
        shard_build, "write_shard", lambda path, samples: made.append(path.name) or true_write(path, samples)
    )
    build_folder(pictures, out, samples_per_shard=8, processes=1)
    assert made == ["shard-00002.tar", "shard-00003.tar"]
    for name in ("shard-00000.tar", "shard-00003.tar", "index.json", "rejected.tsv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    made.clear()
    (out / "shard-00001.tar").unlink()
    build_folder(pictures, out, samples_per_shard=8, processes=1)
    assert made == ["shard-00001.tar"]


def test_a_journal_deletes_nothing_but_shards_of_its_folder(pictures, tmp_path):
    """Shards that an earlier build had and this one has not are deleted, by the names that the journal has."""
    out = tmp_path / "out"
    build_folder(pictures, out, samples_per_shard=8, processes=1)
    (tmp_path / "precious.tar").write_bytes(b"mine")
    row = json.loads((out / "build.jsonl").read_text().splitlines()[1])
    with (out / "build.jsonl").open("a") as journal:
        others = ("notes.txt", "index.json", "x" * 3000, ".", "")
        for name in ("../precious.tar", str(tmp_path / "precious.tar"), "shard-00099.tar", *others):
            journal.write(json.dumps({**row, "shard": name}) + "\n")
    (out / "shard-00099.tar").write_bytes(b"of a build before")
    (out / "notes.txt").write_bytes(b"mine")
    build_folder(pictures, out, samples_per_shard=8, processes=1)
    assert (tmp_path / "precious.tar").read_bytes() == b"mine" and not (out / "shard-00099.tar").exists()
    assert (out / "notes.txt").read_bytes() == b"mine" and (out / "index.json").is_file()


def test_a_row_of_the_journal_that_does_not_tell_of_all_its_images_is_built_again(pictures, tmp_path):
    """As a disk or an editor may have damaged it."""
    build = partial(build_folder, pictures, tmp_path / "out", processes=1)
    build()
    header, row = (tmp_path / "out" / "build.jsonl").read_text().splitlines()
    changed = json.dumps({**json.loads(row), "samples": 0, "rejected": []})
    (tmp_path / "out" / "build.jsonl").write_text(f"{header}\n{changed}\n")
    assert build().samples == 23


@pytest.mark.parametrize("change", ["emptied", "cut", "another"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_finished_shard_that_has_changed_since_is_told_by_the_build_and_written_again_as_it_says(
    pictures, tmp_path, change, indexed
):
    build = partial(build_folder, pictures, tmp_path / "out", samples_per_shard=8, processes=1)
    build()
    shard, other = (tmp_path / "out" / f"shard-0000{number}.tar" for number in (1, 3))
    content = shard.read_bytes()
    shard.write_bytes({"emptied": b"", "cut": content[: len(content) // 2], "another": other.read_bytes()}[change])
    if not indexed:
        (tmp_path / "out" / "index.json").unlink()
        with pytest.raises(UserError, match="samples, but") as caught:
            build()
        assert caught.value.where == str(shard)
        shard.unlink()  # as it says
        build()
        assert shard.read_bytes() == content
    else:
        assert build().samples == 23  # the index has its length and its hash: a training, `verify` and `stats` tell


def test_samples_that_were_left_out_since_are_no_damage_to_a_build(pictures, tmp_path):
    build = partial(build_folder, pictures, tmp_path / "out", samples_per_shard=8, processes=1)
    build()
    leave_out(tmp_path / "out", [Problem("shard-00001.tar", "a watermark", 2)])
    assert build().samples == 23
    assert [len(shard.skip) for shard in load_index(tmp_path / "out").shards] == [0, 1, 0, 0]


@pytest.mark.parametrize("kind", ["file", "below a file", "device", "where nothing can be", "long", "loop", "pipe"])
@pytest.mark.parametrize("command", ["build folder", "build kohya", "index", "filter"])
def test_a_place_where_no_folder_can_be_is_named(pictures, tmp_path, capsys, monkeypatch, kind, command):
    """Of the index of remote shards, which is a file, before any of them is asked for."""
    if command == "index" and kind in ("file", "loop"):
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # these can be replaced, so that the address is tried
    else:
        monkeypatch.setattr("urllib.request.OpenerDirector.open", None)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    outs = {"device": "/dev/null", "where nothing can be": "/proc/x/y", "below a file": tmp_path / "file" / "x"}
    out = str(outs.get(kind, tmp_path / ("n" * 300 if kind == "long" else kind)))
    build_folder(pictures, tmp_path / "shards", processes=1)
    source = str(tmp_path / "shards") if command in ("index", "filter") else str(pictures)
    words = [*command.split(), source, "--out", out]
    words += ["--processes", "1"] if "build" in command else []
    words = ["index", "http://127.0.0.1:9/{0..1}.tar", "--out", out] if command == "index" else words
    assert shards_command.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "hint: " in told
    assert (tmp_path / "file").read_text() == "x"


def test_another_build_in_the_same_folder_is_refused(pictures, tmp_path):
    build_folder(pictures, tmp_path / "out", processes=1)
    for change in ({"samples_per_shard": 5}, {"allow_missing": True}, {"images": ImageOptions(quality=50)}):
        with pytest.raises(UserError, match="other options"):
            build_folder(pictures, tmp_path / "out", processes=1, **change)


@pytest.mark.parametrize("left", [b"", b'{"folder": "/so', b"\0" * 40])
def test_a_header_that_a_full_disk_cut_short_is_written_again(pictures, tmp_path, left):
    out = tmp_path / "out"
    out.mkdir()
    (out / "build.jsonl").write_bytes(left)
    build_folder(pictures, out, processes=1)
    before = (out / "shard-00000.tar").stat().st_mtime_ns
    build_folder(pictures, out, processes=1)  # goes on, and finds nothing to do
    assert (out / "shard-00000.tar").stat().st_mtime_ns == before


def test_of_two_calls_that_begin_at_once_the_second_is_refused_unless_it_makes_the_same(tmp_path):
    first, same, another = (
        Journal(tmp_path / "j.jsonl", {"made_of": made_of}, other="holds another") for made_of in ("a", "a", "b")
    )
    first.begin()
    same.begin()
    with pytest.raises(UserError, match="holds another"):
        another.begin()
    assert (tmp_path / "j.jsonl").read_text() == '{"made_of": "a"}\n'


def test_a_build_that_came_to_nothing_leaves_its_folder_to_one_with_other_options(pictures, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="were rejected"):
        build_folder(pictures, out, processes=1, images=ImageOptions(min_size_px=10**6))
    assert (out / "rejected.tsv").read_text()  # says why
    assert build_folder(pictures, out, processes=1).samples == load_index(out).samples > 0
    with pytest.raises(UserError, match="other options"):
        build_folder(pictures, out, processes=1, images=ImageOptions(min_size_px=10**6))


@pytest.mark.parametrize(
    "beside", [[], [".lock", "rejected.tsv"], ["00.tar"], ["a/00.tar"], [".00.tar.captions.jsonl"]]
)
@pytest.mark.parametrize("rows", [0, 1])
def test_a_header_alone_claims_no_folder_and_anything_that_was_made_does(tmp_path, beside, rows):
    """Of two that stand before the same claim, one gets it."""
    first = Journal(tmp_path / "j.jsonl", {"made_of": "a"}, other="holds another")
    first.begin()
    for _ in range(rows):
        first.note(shard="x")
    for name in beside:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    if rows or not {*beside} <= {".lock", "rejected.tsv"}:
        with pytest.raises(UserError, match="holds another"):
            Journal(tmp_path / "j.jsonl", {"made_of": "b"}, other="holds another")
        return
    second, third = (Journal(tmp_path / "j.jsonl", {"made_of": name}, other="holds another") for name in "bc")
    second.begin()
    with pytest.raises(UserError, match="holds another"):
        third.begin()
    assert (tmp_path / "j.jsonl").read_text() == '{"made_of": "b"}\n'


def test_nothing_is_written_into_a_folder_of_other_shards(pictures, kit, tmp_path):
    out = kit.write_shards(tmp_path / "out", [2])
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UserError, match="already holds"):
        build_folder(pictures, out, processes=1)
    assert sorted(path.name for path in out.iterdir()) == before


def test_a_folder_that_another_call_is_building_into_is_refused(pictures, tmp_path):
    (tmp_path / "out").mkdir()
    with alone_in(tmp_path / "out", "building"), pytest.raises(UserError, match="another process is building"):
        build_folder(pictures, tmp_path / "out", processes=1)
    assert build_folder(pictures, tmp_path / "out", processes=1).samples


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_are_no_locks_a_build_goes_on_and_says_so(pictures, tmp_path, monkeypatch, capsys, number):
    def refuse(handle, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert build_folder(pictures, tmp_path / "out", processes=1).samples
    assert f"cannot be locked ({os.strerror(number)})" in capsys.readouterr().err


def test_a_file_that_has_the_name_of_the_lock_keeps_what_is_in_it(pictures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text("another program's")
    assert build_folder(pictures, tmp_path / "out", processes=1).samples
    assert (tmp_path / "out" / ".lock").read_text() == "another program's"


def test_nothing_to_build_is_told(kit, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        build_folder(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match="all 1 files were rejected"):
        build_folder(tmp_path / "empty", tmp_path / "out", processes=1)
    with pytest.raises(UserError, match="samples-per-shard"):
        build_folder(tmp_path / "empty", tmp_path / "other", samples_per_shard=0)


def test_pictures_are_kept_shrunk_or_encoded_as_asked(kit):
    jpeg = kit.encoded(Image.new("RGB", (80, 40), (9, 99, 199)), "JPEG")
    gif = kit.encoded(Image.new("RGB", (80, 40), (9, 99, 199)), "GIF")
    assert image_field(jpeg, ImageOptions()) == {"jpg": jpeg}
    assert image_field(jpeg, ImageOptions(short_side_px=40)) == {"jpg": jpeg}
    for data, options, extension, size in [
        (jpeg, ImageOptions(short_side_px=20), "jpg", (40, 20)),
        (gif, ImageOptions(), "webp", (80, 40)),
        (jpeg, ImageOptions(encoding="webp"), "webp", (80, 40)),
        (gif, ImageOptions(encoding="jpeg", short_side_px=10), "jpg", (20, 10)),
    ]:
        ((found, encoded),) = image_field(data, options).items()
        image = Image.open(io.BytesIO(encoded))
        assert (found, image.size) == (extension, size)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - (9, 99, 199)).max() < 12
    with pytest.raises(SampleFault, match="too small"):
        image_field(jpeg, ImageOptions(min_size_px=41))


def test_turned_pictures_that_are_encoded_anew_are_upright(kit):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = kit.encoded(Image.new("RGB", (80, 40)), "JPEG", exif=exif)
    ((_, encoded),) = image_field(data, ImageOptions(encoding="webp")).items()
    assert Image.open(io.BytesIO(encoded)).size == (40, 80)


def test_files_that_break_writers_and_parsers_are_rejected_one_by_one(kit, tmp_path):
    """Sides no encoder takes, brackets nested by the thousand, names and records that are not UTF-8."""
    root = tmp_path / "in"
    root.mkdir()
    for name in ("wide.gif", "deep.png", "half.png", "good.png", os.fsdecode(b"caf\xe9.png")):
        (root / name).write_bytes(kit.coloured(7))
        (root / name).with_suffix(".json").write_text('{"caption": "x"}')
    (root / "wide.gif").write_bytes(kit.encoded(Image.new("L", (16_400, 1)), "GIF"))
    (root / "deep.json").write_text('{"caption": ' + "[" * 100_000)
    (root / "half.json").write_text('{"caption": "x", "artist": "\\ud800"}')
    report = build_folder(root, tmp_path / "out", processes=1)
    assert report.samples == 3
    reasons = {name: reason.split(":")[0] for name, reason in rejections(tmp_path / "out").items()}
    assert reasons == {"wide.gif": "cannot be written as WEBP", "deep.png": "undecodable JSON record (in deep.json)"}
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as archive:
        records = [json.load(archive.extractfile(name)) for name in archive.getnames() if name.endswith("json")]
    assert sorted(record["source"] for record in records) == [os.fsdecode(b"caf\xe9.png"), "good.png", "half.png"]
    assert [record["artist"] for record in records if "artist" in record] == ["\ud800"]
