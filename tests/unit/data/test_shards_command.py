"""hdm-shards: each command through its main function."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hdm_lightning.cli.shards import BUILDERS, COMMANDS, main
from hdm_lightning.data.index import load_index
from hdm_lightning.data.inspection import collect, crop_positions
from hdm_lightning.data.samples import stream
from hdm_lightning.models.positions import token_positions


@pytest.fixture
def folder(kit, tmp_path):
    """Three shards, one sample of which has a caption that is not UTF-8."""
    root = kit.write_shards(tmp_path / "shards", [6, 9], width=24, height=16)
    entries = [("a.png", kit.coloured(1, width=40, height=160)), ("a.txt", b"\xff"), *kit.entries_of(50, 2)]
    kit.write_tar(root / "002.tar", entries)
    assert main(["index", str(root)]) == 0
    return root


def test_help_of_everything(capsys):
    for words in (["--help"], *([command, "--help"] for command in COMMANDS)):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    for builder in BUILDERS:
        with pytest.raises(SystemExit) as end:
            main(["build", builder, "--help"])
        assert end.value.code == 0
        assert builder in capsys.readouterr().out
    assert main(["build", "nothing"]) == 2
    assert main(["build", "foldr"]) == 2 and "did you mean 'folder'?" in capsys.readouterr().err


def test_build_and_index(kit, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(5):
        (pictures / f"{number}.png").write_bytes(kit.coloured(number))
        (pictures / f"{number}.txt").write_text("x")
    (pictures / "bad.png").write_bytes(b"x")
    out = tmp_path / "out"
    assert main(["build", "folder", str(pictures), "--out", str(out), "--processes", "1"]) == 0
    assert "5 images, 5 captions, 0 files of other kinds; 1 images rejected" in capsys.readouterr().out
    assert main(["build", "kohya", str(pictures), "--out", str(out), "--processes", "1"]) == 2
    assert "other options" in capsys.readouterr().err
    assert main(["build", "shapes", "--out", str(tmp_path / "scenes"), "--count", "3", "--processes", "1"]) == 0
    assert load_index(tmp_path / "scenes").samples == 3
    (out / "index.json").unlink()
    assert main(["build", "img2dataset", str(out), "--processes", "1"]) == 0
    assert "5 samples in 1 shards, 0 left out" in capsys.readouterr().out
    assert main(["index", str(tmp_path / "nowhere")]) == 2


def test_index_of_remote_shards(folder, tmp_path, capsys):
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in folder.glob("*.tar"):
        memory.pipe_file(f"/far/{file.name}", file.read_bytes())
    out = tmp_path / "far.json"
    assert main(["index", "memory://far/{000..002}.tar", "--out", str(out)]) == 0
    assert load_index(out).shards == load_index(folder).shards
    assert main(["index", "memory://far/{000..002}.tar"]) == 2
    assert main(["index", "memory://far/{000..009}.tar", "--out", str(out)]) == 2
    assert main(["index", "memory://far", "--out", str(out)]) == 2
    capsys.readouterr()


@pytest.mark.parametrize("words", [["FOLDER", "--out", "x.json"], ["URL", "--out", "x.json", "--new-only"]])
def test_what_would_be_left_unread_of_a_call_is_refused(folder, capsys, words):
    """Such as another place for the index of a folder, which lies beside its shards."""
    before = (folder / "index.json").read_bytes()
    places = {"FOLDER": str(folder), "URL": f"file://{folder}/000.tar"}
    assert main(["index", *(places.get(word, word) for word in words)]) == 2
    assert words[-2 if words[0] == "FOLDER" else -1] in capsys.readouterr().err
    assert (folder / "index.json").read_bytes() == before


def test_an_interrupted_index_of_remote_shards_goes_on(folder, tmp_path, monkeypatch):
    import fsspec

    from hdm_lightning.data import scanning

    memory = fsspec.filesystem("memory")
    for file in folder.glob("*.tar"):
        memory.pipe_file(f"/distant/{file.name}", file.read_bytes())
    pattern, out, read, scan = "memory://distant/{000..002}.tar", tmp_path / "far.json", [], scanning._scan_remote

    def interrupted(url):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(url)
        return scan(url)

    monkeypatch.setattr(scanning, "_scan_remote", interrupted)
    assert main(["index", pattern, "--out", str(out)]) == 130
    assert not out.exists()
    monkeypatch.setattr(scanning, "_scan_remote", lambda url: read.append(url) or scan(url))
    assert main(["index", pattern, "--out", str(out)]) == 0
    assert [url[-7:] for url in read] == ["000.tar", "001.tar", "002.tar"]
    assert load_index(out).shards == load_index(folder).shards
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_verify_finds_and_marks(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    assert main(["verify", str(folder), "--decode"]) == 1
    told = capsys.readouterr().out
    assert "002.tar sample 0 (a): caption is not UTF-8" in told and "1 problems" in told
    assert main(["verify", str(folder), "--mark"]) == 1
    assert "1 samples left out, 17 remain" in capsys.readouterr().out
    record = load_index(folder).shards[2]
    assert record.samples == 2 and record.skip == {0: "caption is not UTF-8: byte 0xff at 0"}
    assert main(["verify", str(folder), "--decode", "--jobs", "2"]) == 0
    data = bytearray((folder / "000.tar").read_bytes())
    data[600] ^= 1
    (folder / "000.tar").write_bytes(data)
    (folder / "001.tar").unlink()
    (folder / "extra.tar").write_bytes(b"")
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    told = capsys.readouterr().out
    assert "000.tar: wrong checksum" in told and "001.tar: missing" in told and "extra.tar: is not in the index" in told
    (folder / "000.tar").write_bytes(data[:2000])
    main(["verify", str(folder), "--decode"])
    told = capsys.readouterr().out
    assert "has 2000 bytes" in told and told.count("000.tar sample") == 6
    assert main(["verify", str(folder / "none")]) == 2


def test_missing_shards_are_marked_too(folder, kit, capsys):
    (folder / "001.tar").unlink()
    assert main(["verify", str(folder), "--mark"]) == 1
    assert "10 samples left out, 8 remain" in capsys.readouterr().out
    assert [record.name for record in load_index(folder).shards] == ["000.tar", "002.tar"]
    assert main(["verify", str(folder), "--decode"]) == 0
    assert all(sample.weight for sample in stream(kit.stream_config(folder), kit.letters, stop=8))


def test_stats_are_the_numbers_of_the_set(folder, tmp_path, capsys):
    found = collect([str(folder)])
    assert (found.shards, found.samples) == (3, 18)
    assert sorted(found.short_side.tolist()) == [16] * 17 + [40]
    assert np.allclose(sorted(found.aspect)[:3], [0.25, 1, 1]) and np.isclose(found.aspect.max(), 1.5)
    assert found.caption_lengths.tolist() == [2] * 17 and found.bad_captions == 1
    picture = tmp_path / "stats.png"
    assert main(["stats", str(folder), "--picture", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "samples    18" in told and "17 read, 1 missing" in told and "from 1.50" in told
    assert Image.open(picture).width > 800


def test_stats_in_tokens(folder, tiny_text_encoder, capsys):
    assert main(["stats", str(folder), "--tokenizer", str(tiny_text_encoder)]) == 0
    assert "tokens per caption, quantiles: 5% 2" in capsys.readouterr().out


def test_show_draws_the_samples_of_the_stream(kit, folder, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["show", str(folder), "--out", str(out), "--resolution", "16", "--count", "7", "--columns", "3"]) == 0
    sheet = np.asarray(Image.open(out).convert("RGB"))
    samples = list(stream(kit.stream_config(folder, seed=0, stage="", lanes=96, window=32), kit.letters, stop=7))
    for number, sample in enumerate(samples):
        row, column = divmod(number, 3)
        y, x = 8 + row * (sheet.shape[0] - 8) // 3 + 50, 8 + column * 200 + 50
        assert sheet[y, x].tolist() == sample.image[:, 0, 0].tolist()
    assert "7 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("show", "--out", "sheet.xyz"), ".png"),
        (("show", "--out", "no/such/folder.png/sheet.png"), "--out"),
        (("show", "--out", "sheet.png", "--count", "0"), "is 0; expected 1 or more"),
        (("show", "--out", "sheet.png", "--columns", "0"), "is 0; expected 1 or more"),
        (("show", "--out", "sheet.png", "--start", "-5"), "is -5; expected 0 or more"),
        (("stats", "--picture", "stats.xyz"), ".svg"),
        (("stats", "--captions", "-1"), "is -1; expected 0 or more"),
        (("verify", "--jobs", "0"), "is 0; expected 1 or more"),
        (("verify", "--jobs", "two"), "'two' is not a whole number"),
        (("build", "kohya", "--keep-tokens", "-1"), "--keep-tokens: is -1"),
        (("build", "kohya", "--short-side", "2x"), "--short-side: '2x' is not a whole number"),
        (("build", "openclipart", "--count", "0"), "--count: is 0"),
        (("build", "openclipart", "--max-image-bytes", "0"), "--max-image-bytes: is 0"),
        (("build", "openclipart", "--processes", "-1"), "--processes: is -1"),
        (("build", "shapes", "--count", "many"), "--count: 'many' is not a whole number"),
        (("build", "shapes", "--processes", "0"), "--processes: is 0"),
        (("build", "shapes", "--aspects", "wide"), "--aspects: expected numbers"),
        (("build", "shapes", "--objects", "1:half"), "--objects: expected 1:"),
    ],
)
def test_what_cannot_be_meant_is_told_before_anything_is_read(tmp_path, monkeypatch, capsys, words, told):
    (tmp_path / "no").touch()
    monkeypatch.chdir(tmp_path)
    command = words[: 2 if words[0] == "build" else 1]
    try:
        status = main([*command, "no folder of shards", *words[len(command) :]])
    except SystemExit as end:
        status = end.code
    assert status == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("convention", ["area", "long_side"])
def test_positions_on_the_sheet_are_those_of_the_network(kit, folder, convention):
    """Half a token beyond the centres of the outermost tokens, where a token is a pixel."""
    seen = set()
    for sample in stream(kit.stream_config(folder), kit.letters, stop=18):
        if sample.weight:
            grid = token_positions(16, 16, crop=torch.tensor([sample.crop]), convention=convention)[0].view(16, 16, 2)
            half = (grid[1, 1] - grid[0, 0]) / 2
            expected = torch.cat([grid[0, 0] - half, grid[-1, -1] + half]).tolist()
            assert np.allclose(crop_positions(sample, convention), expected, atol=1e-5)
            seen.add(sample.crop)
    assert len(seen) > 3


def test_index_json_is_plain(folder):
    document = json.loads((folder / "index.json").read_text())
    assert document["format"] == 3 and document["samples"] == 18
    assert {"name", "samples", "bytes", "sha256"} <= set(document["shards"][0])
    lines = (folder / "index.json").read_text().splitlines()
    assert len(lines) == 3 + 2 and all(json.loads(line.strip(","))["name"] for line in lines[1:-1])  # a line a shard
