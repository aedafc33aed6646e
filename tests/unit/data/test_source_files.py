"""Folders of images as people have them: each file is used, or named with its reason; a rebuild takes what changed."""

import json
import os
import random
import tarfile
import unicodedata

import pytest
from PIL import Image, PngImagePlugin

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.index import load_index
from hdm_lightning.data.samples import stream
from hdm_lightning.datasets.folder import build_folder
from hdm_lightning.datasets.kohya import KohyaOptions, build_kohya
from hdm_lightning.datasets.source_files import look_into
from hdm_lightning.errors import UserError
from shard_contents import rejections

ALPHABET = "abZ 9._-éüñŁж日本🦊()[]&%'#"


def contents(kit, out, count):
    config = kit.stream_config(out, context_length=99, captions=CaptionRules(drop=0.0))
    return {int(sample.image[0, 0, 0]): sample.caption for sample in stream(config, kit.letters, stop=count)}


def build(root, out, **options):
    lines = []
    report = build_folder(root, out, processes=1, say=lines.append, **options)
    return report, lines


def some_name(draw):
    name = "".join(draw.choice(ALPHABET) for _ in range(draw.randint(1, 12))).strip(" .")
    return name or "x"


def test_captions_are_found_whatever_the_case_and_the_form_of_their_names(kit, tmp_path):
    draw, wanted = random.Random(1), {}
    forms, endings = ("NFC", "NFD"), (".png", ".PNG", ".Png", ".jpg", ".WebP")
    for number in range(200):
        stem, ending = f"{number} {some_name(draw)}", draw.choice(endings)
        image = unicodedata.normalize(draw.choice(forms), stem) + ending
        base = stem + ending if draw.random() < 0.2 else stem  # `a.png.txt` or `a.txt`
        text = unicodedata.normalize(draw.choice(forms), base) + draw.choice((".txt", ".TXT", ".Txt", ".caption"))
        (tmp_path / image).write_bytes(kit.coloured(number))
        (tmp_path / text).write_text(f"number {number}")
        wanted[image] = text
    found = look_into(tmp_path, ("txt", "caption"))
    texts = {image.name: image.texts for image in found.images}
    assert not found.unused and texts == {name: (text,) for name, text in wanted.items()}


def test_what_is_exactly_another_images_caption_is_not_borrowed(kit, tmp_path):
    for name in ("a.png", "A.png", "b.png", "B.png"):
        (tmp_path / name).write_bytes(kit.coloured(1))
    for name in ("a.txt", "B.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    texts = {image.name: image.texts for image in look_into(tmp_path, ("txt",)).images}
    assert texts == {"a.png": ("a.txt",), "A.png": (), "b.png": ("b.txt",), "B.png": ("B.txt",)}


def test_masks_are_found_whatever_the_case_and_the_form_of_their_names(kit, tmp_path):
    wanted = {
        "a.jpg": "a.MASK.PNG",
        "b.png": "B.mask.png",
        unicodedata.normalize("NFC", "\u00e9.PNG"): unicodedata.normalize("NFD", "\u00e9.mask.Png"),
        "d.webp": "d.webp.Mask.png",
        "x.png": "x.mask.png",
        "X.png": None,
    }
    for name in {*wanted, *wanted.values()} - {None}:
        (tmp_path / name).write_bytes(kit.coloured(1))
    (tmp_path / "alone.MASK.png").write_bytes(kit.coloured(1))
    found = look_into(tmp_path, ("txt",))
    assert {image.name: image.mask for image in found.images} == wanted
    assert found.unused == [("alone.MASK.png", "a mask without an image")]


def test_an_image_whose_mask_cannot_be_used_is_named_and_not_built_unmasked(kit, tmp_path):
    root = kit.write_images(tmp_path / "in", dict.fromkeys("abcd", "x"))
    (tmp_path / "elsewhere.png").write_bytes(kit.encoded(Image.new("L", (9, 9), 255)))
    os.symlink(tmp_path / "elsewhere.png", root / "A.mask.png")
    os.symlink("nowhere", root / "b.mask.png")
    (root / "c.mask.png").write_bytes(b"no image")
    report, _ = build(root, tmp_path / "out")
    assert report.samples == 1 and [name for name, _ in report.rejected] == ["c.png"]
    assert "in its mask" in report.rejected[0][1]
    assert {name for name, _ in report.unused} == {"A.mask.png", "b.mask.png", "a.png", "b.png", "a.txt", "b.txt"}
    report, _ = build(root, tmp_path / "followed", follow_links=True)
    assert report.samples == 2 and "a.png" not in dict(report.unused)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("ending", ["", ".jpg_large", ".data", ".jpg"])
def test_images_are_known_by_their_content(kit, tmp_path, kind, ending):
    (tmp_path / f"a{ending}").write_bytes(kit.encoded(Image.new("RGB", (16, 16), (9, 99, 199)), kind))
    (tmp_path / "a.txt").write_text("blue")
    report, _ = build(tmp_path, tmp_path / "out")
    assert (report.images, report.captions, report.unused) == (1, 1, [])
    (sample,) = stream(kit.stream_config(tmp_path / "out"), kit.letters, stop=1)
    assert abs(sample.image[:, 8, 8].astype(int) - (9, 99, 199)).max() < 12


def test_every_file_is_used_or_named(kit, tmp_path):
    """Any files at all: images, captions and all the rest come to the number of files that there are."""
    draw, root, kinds = random.Random(2), tmp_path / "in", (b"%PDF-1", b"PK\3\4", b"<html>", b"", b"{}", b"\0" * 9)
    root.mkdir()
    for number in range(300):
        name = root / f"{number}{draw.choice(('.png', '.txt', '.json', '.zip', '.heic', '', '.mp4', '.tga', '.npz'))}"
        name.write_bytes(kit.coloured(number) if name.suffix == ".png" else draw.choice(kinds))
    (root / ".DS_Store").write_bytes(b"x")
    (root / "Thumbs.db").write_bytes(b"x")
    os.mkfifo(root / "pipe.png")
    os.symlink("/etc/passwd", root / "out.txt")
    os.symlink("nowhere", root / "gone.png")
    report, _ = build(root, tmp_path / "out", allow_missing=True)
    named = {name for name, _ in report.unused + report.rejected}
    images = {image.name for image in look_into(root, ("txt", "caption")).images}
    assert len(images | named) == len(list(root.iterdir())) and report.images == len(images)
    assert {"pipe.png", "out.txt", "gone.png", ".DS_Store", "Thumbs.db"} <= named == set(rejections(tmp_path / "out"))
    line = report.told(tmp_path / "out")
    assert f"{report.images} images, {report.captions} captions, {len(report.unused)} files of other kinds: " in line
    assert "/etc" not in "".join(path.read_text("latin-1") for path in (tmp_path / "out").iterdir())
    told = rejections(tmp_path / "out")
    assert "a link out of the folder" in told["out.txt"] and "a device, pipe or socket" in told["pipe.png"]
    assert " .mp4" in line


def test_links_lead_out_only_where_asked_for_and_never_round_in_circles(kit, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    elsewhere = kit.write_images(tmp_path / "elsewhere", {str(n): f"number {n}" for n in range(3)})
    os.symlink(elsewhere, root / "set")
    os.symlink(root, elsewhere / "back")
    with pytest.raises(UserError, match="1 link out of the folder") as caught:
        build(root, tmp_path / "out")
    assert caught.value.hint == "add --follow-links"
    report, _ = build(root, tmp_path / "out", follow_links=True)
    assert report.images == 3 and contents(kit, tmp_path / "out", 3) == {n: f"number {n}" for n in range(3)}
    assert "already included" in rejections(tmp_path / "out")["set/back"]


@pytest.mark.parametrize(
    "record",
    [
        b'[{"bbox": [1]}]',
        b"",
        b'{"a":1}\n{"a":2}',
        b'{"a":1,}',
        b"// x\n{}",
        b"[" * 5000,
        b'"text"',
        b"\xff\xff",
        b"7",
        b"{" * 5_000_000,
    ],
)
def test_a_good_caption_counts_whatever_its_record_is(kit, tmp_path, record):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.png").write_bytes(kit.coloured(1))
    (root / "a.txt").write_text("good")
    (root / "a.json").write_bytes(record)
    for builder in (build_folder, build_kohya):
        report = builder(root, tmp_path / builder.__name__, processes=1)
        assert report.images == report.captions == 1 and [name for name, _ in report.unused] == ["a.json"]
    (root / "a.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"in a\.txt"):
        build(root, tmp_path / "bad")


def test_a_record_keeps_its_own_keys(kit, tmp_path):
    (tmp_path / "1_x").mkdir()
    (tmp_path / "1_x" / "a.png").write_bytes(kit.coloured(1))
    theirs = {"caption": "c", "source": "https://example.invalid/1", "repeat": "mine"}
    (tmp_path / "1_x" / "a.json").write_text(json.dumps(theirs))
    build_kohya(tmp_path, tmp_path / "out", processes=1)
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as archive:
        record = json.load(archive.extractfile("00000000.json"))
    assert record == {**theirs, "hdm_source": "1_x/a.png", "hdm_repeat": 0, "repeats": 1}


def test_a_rebuild_takes_what_has_changed_and_says_so(kit, tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    draw, wanted = random.Random(3), {}

    def put(number, caption):
        (root / f"{number:03d}.png").write_bytes(kit.coloured(number))
        (root / f"{number:03d}.txt").write_text(caption)
        wanted[number] = caption

    for number in range(0, 40, 2):
        put(number, f"old {number}")
    report, lines = build(root, out, samples_per_shard=4)
    assert report.images == 20 and not lines
    _, lines = build(root, out, samples_per_shard=4)
    assert "nothing to do" in lines[0] and "--anew" in lines[0]
    for _ in range(6):
        number = draw.choice(sorted(wanted))
        match draw.choice(("caption", "gone", "new", "bad")):
            case "caption":
                put(number, f"new {draw.random()}")
            case "gone":
                (root / f"{number:03d}.png").unlink()
                (root / f"{number:03d}.txt").unlink()
                del wanted[number]
            case "new":
                put(draw.randrange(1, 40, 2), "one more")
            case "bad":
                (root / f"{number:03d}.txt").write_bytes(b"\xff")
                report, _ = build(root, out, samples_per_shard=4)
                assert [name for name, _ in report.rejected] == [f"{number:03d}.png"]
                put(number, "mended")
        report, lines = build(root, out, samples_per_shard=4)
        assert lines and report.images == len(wanted) == load_index(out).samples and not report.rejected
        assert contents(kit, out, len(wanted)) == wanted
    build(root, tmp_path / "fresh", samples_per_shard=4)
    for path in (tmp_path / "fresh").glob("*.tar"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert len(list(out.glob("*.tar"))) == len(list((tmp_path / "fresh").glob("*.tar")))


def test_one_changed_file_has_one_shard_built_again(kit, tmp_path):
    root, out = kit.write_images(tmp_path / "in", {f"{n:02d}": "x" for n in range(12)}), tmp_path / "out"
    build(root, out, samples_per_shard=3)
    before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    (root / "04.txt").write_text("y")
    _, lines = build(root, out, samples_per_shard=3)
    after = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert [name for name in before if before[name] != after[name]] == ["shard-00001.tar"]
    assert "3 shards are kept, 1 are rebuilt" in lines[0]


@pytest.mark.parametrize("number", [1001, 2023, 20240115, 10**40])
def test_numbers_that_are_dates_are_no_repeats(kit, tmp_path, number):
    for name in (f"{number}_trip", "0_off", "3_fox"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.png").write_bytes(kit.coloured(1))
    with pytest.raises(UserError, match=f"asks for {number} copies") as caught:
        build_kohya(tmp_path / "in", tmp_path / "out", processes=1)
    assert "--max-repeats" in caught.value.hint and not (tmp_path / "out").exists()
    lines = []
    once = KohyaOptions(max_repeats=2, apply_repeats=False)
    report = build_kohya(tmp_path / "in", tmp_path / "out", once, processes=1, say=lines.append)
    assert report.samples == 3 and len(lines) == 3
    (tmp_path / "in" / f"{number}_trip").rename(tmp_path / "in" / "2_trip")
    report = build_kohya(tmp_path / "in", tmp_path / "more", processes=1)
    assert (report.samples, report.images) == (5, 2)
    assert ("0_off/a.png", "its folder asks for 0 repeats") in report.unused


def two_folders(kit, root):
    """Images in a folder that asks for two copies, and one with caption and mask in a folder that asks for none."""
    for folder, names in (("2_fox", "abc"), ("0_off", "d")):
        kit.write_images(root / folder, dict.fromkeys(names, "x"))
    (root / "0_off" / "d.mask.png").write_bytes(kit.coloured(1))


def test_a_folder_that_is_off_has_all_its_files_named(kit, tmp_path):
    two_folders(kit, tmp_path / "in")
    report = build_kohya(tmp_path / "in", tmp_path / "out", processes=1)
    assert [name for name, _ in report.unused] == ["0_off/d.mask.png", "0_off/d.png", "0_off/d.txt"]


def test_a_bound_on_repeats_makes_no_other_build(kit, tmp_path):
    out = tmp_path / "out"
    two_folders(kit, tmp_path / "in")
    build_kohya(tmp_path / "in", out, processes=1)
    lines = []
    build_kohya(tmp_path / "in", out, KohyaOptions(max_repeats=2), processes=1, say=lines.append)
    assert any("nothing to do" in line for line in lines)
    header, *rows = (out / "build.jsonl").read_text().splitlines()
    older = {**json.loads(header), "max_repeats": 1000}
    del older["follow_links"]
    (out / "build.jsonl").write_text("\n".join([json.dumps(older), *rows]) + "\n")
    build_kohya(tmp_path / "in", out, processes=1, say=lines.append)
    assert "nothing to do" in lines[-1]
    with pytest.raises(UserError, match="other options"):
        build_kohya(tmp_path / "in", out, KohyaOptions(tag=","), processes=1)


def test_rows_of_an_earlier_version_are_told_as_such(kit, tmp_path):
    root, out = kit.write_images(tmp_path / "in", {str(n): "x" for n in range(6)}), tmp_path / "out"
    build(root, out, samples_per_shard=2)
    header, *rows = [json.loads(line) for line in (out / "build.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        del row["digest"]
    (out / "build.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
    (root / "4.txt").write_text("changed")
    _, (line,) = build(root, out, samples_per_shard=2)
    assert "0 shards are kept" in line and "2 are rebuilt because an earlier version wrote them" in line
    assert "1 are rebuilt because files have changed" in line


@pytest.mark.parametrize("builder", [build_folder, build_kohya])
def test_a_build_that_followed_links_loses_no_shard_to_one_that_does_not(kit, tmp_path, builder):
    out = tmp_path / "out"
    root, elsewhere = (kit.write_images(tmp_path / name, {name: "x"}) for name in ("in", "elsewhere"))
    os.symlink(elsewhere, root / "set")
    assert builder(root, out, follow_links=True, samples_per_shard=1, processes=1).images == 2
    with pytest.raises(UserError, match="other options"):
        builder(root, out, samples_per_shard=1, processes=1)
    assert len(list(out.glob("*.tar"))) == 2 == load_index(out).samples
    header, *rows = (out / "build.jsonl").read_text().splitlines()
    older = json.loads(header)
    del older["follow_links"]  # as earlier versions wrote it
    (out / "build.jsonl").write_text("\n".join([json.dumps(older), *rows]) + "\n")
    lines = []
    assert builder(root, out, follow_links=True, samples_per_shard=1, processes=1, say=lines.append).images == 2
    assert "nothing to do" in lines[-1]
    report = builder(root, out, samples_per_shard=1, processes=1, say=lines.append)
    assert "1 are removed" in lines[-1] and ("set", "a link out of the folder") in [
        (name, reason.partition(",")[0]) for name, reason in report.unused
    ]


def test_png_with_much_text_or_a_large_profile_is_taken(kit, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "{" + "x" * 3_000_000 + "}", zip=True)
    (tmp_path / "a.png").write_bytes(kit.encoded(Image.new("RGB", (9, 9)), pnginfo=info, icc_profile=b"\0" * 2_000_000))
    (tmp_path / "a.txt").write_text("x")
    assert build(tmp_path, tmp_path / "out")[0].images == 1
