"""Shards from tables: parquet files and data sets of the hub, their columns, faulty rows, and builds that go on."""

import io
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import hub
from hdm_lightning.cli.shards import main
from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.index import load_index
from hdm_lightning.data.samples import stream
from hdm_lightning.datasets.build import ShardJournal
from hdm_lightning.datasets.hub import HubTable
from hdm_lightning.datasets.parquet import ParquetTable
from hdm_lightning.datasets.rows import Columns, build_rows
from hdm_lightning.errors import UserError
from shard_contents import digests, members_in


def write(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.fixture
def table(kit, tmp_path):
    """Two files of 13 and 12 rows in small groups: bytes, a text, a score."""
    for number, (first, count) in enumerate(((0, 13), (13, 12))):
        each = range(first, first + count)
        columns = {
            "picture": [kit.coloured(row) for row in each],
            "text": [f"number {row}" for row in each],
            "aesthetic": [row / 2 for row in each],
        }
        write(tmp_path / "table" / f"{number}.parquet", columns, row_group_size=5)
    return tmp_path / "table"


PICTURES = Columns("picture", ("text",))


def build(place, out, columns=PICTURES, **options):
    chosen = {"samples_per_shard": 7, "threads": 1, **options}
    return build_rows(ParquetTable([str(place)], columns), out, **chosen)


def test_rows_become_samples_in_their_order_with_what_else_they_say(kit, table, tmp_path):
    report = build(table, tmp_path / "out")
    assert (report.images, report.captions, report.rejected) == (25, 25, [])
    found = members_in(tmp_path / "out")
    assert list(found) == [f"{row:08d}" for row in range(25)]
    for row, members in enumerate(found.values()):
        assert members["png"] == kit.coloured(row) and members["txt"] == f"number {row}".encode()
        place = f"0.parquet#{row}" if row < 13 else f"1.parquet#{row - 13}"
        assert json.loads(members["json"]) == {"aesthetic": row / 2, "source": place}
    assert [shard.samples for shard in load_index(tmp_path / "out").shards] == [7, 7, 7, 4]


@pytest.mark.parametrize("first", [0, 4, 5, 12, 13, 14, 24, 25, 30])
def test_reading_begins_at_any_row(table, first):
    rows = list(ParquetTable([str(table)], Columns("picture", ("text",))).read(first))
    assert [row.values["text"] for row in rows] == [f"number {row}" for row in range(first, 25)]


@pytest.mark.parametrize(
    ("places", "named"),
    [
        (["a/x.parquet", "b/x.parquet"], ["a/x.parquet", "b/x.parquet"]),
        (["a/x.parquet", "a/y.parquet"], ["x.parquet", "y.parquet"]),
        (["a/q/x.parquet", "b/q/x.parquet", "b/q/y.parquet"], ["a/q/x.parquet", "b/q/x.parquet", "b/q/y.parquet"]),
        (["a/x.parquet", "a/../a/x.parquet"], ["x.parquet"]),
        (["a", "a/X.PARQUET"], ["X.PARQUET", "x.parquet"]),
    ],
)
def test_rows_of_files_of_the_same_name_are_told_apart_and_a_file_named_twice_counts_once(kit, tmp_path, places, named):
    for file in ("a/x", "b/x", "a/y", "a/q/x", "b/q/x", "b/q/y"):
        if any(file in place for place in places):
            write(tmp_path / f"{file}.parquet", {"picture": [kit.coloured(1), b""], "text": [file, "x"]})
    if "a/X.PARQUET" in places:
        write(tmp_path / "a" / "x.parquet", {"picture": [kit.coloured(1), b""], "text": ["x", "x"]})
        write(tmp_path / "a" / "X.PARQUET", {"picture": [kit.coloured(2), b""], "text": ["X", "x"]})
    report = build_rows(
        ParquetTable([str(tmp_path / place) for place in places], PICTURES), tmp_path / "out", threads=1
    )
    assert [name for name, _ in report.rejected] == [f"{name}#1" for name in named]
    sources = [json.loads(members["json"])["source"] for members in members_in(tmp_path / "out").values()]
    assert sources == [f"{name}#0" for name in named]


def test_a_link_to_a_folder_of_files_elsewhere_is_refused_by_name(kit, table, tmp_path):
    write(tmp_path / "elsewhere" / "x.parquet", {"picture": [kit.coloured(1)], "text": ["x"]})
    os.symlink(tmp_path / "elsewhere", table / "more")
    with pytest.raises(UserError) as caught:
        ParquetTable([str(table)], PICTURES)
    assert caught.value.where == str(table / "more")
    (table / "more").unlink()
    assert ParquetTable([str(table), str(tmp_path / "elsewhere")], PICTURES).rows == 26


def test_large_groups_are_read_a_few_rows_at_a_time(kit, tmp_path):
    columns = {"picture": [kit.coloured(row) for row in range(300)], "text": [f"{row}" for row in range(300)]}
    file = write(tmp_path / "one.parquet", columns)
    rows = list(ParquetTable([str(file)], Columns("picture", ("text",))).read(130))
    assert [row.name for row in rows] == [f"one.parquet#{row}" for row in range(130, 300)]


def test_several_captions_go_into_the_record_with_their_columns_as_kinds(kit, tmp_path):
    columns = {
        "image": [{"bytes": kit.coloured(row), "path": f"{row}.png"} for row in range(3)],
        "short": ["a", "b", None],
        "long": [["one", "two"], [], ["three"]],
        "caption": ["not used", "x", "y"],
    }
    file = write(tmp_path / "t.parquet", columns)
    words = ["build", "parquet", str(file), "--out", str(tmp_path / "o"), "--threads", "1"]
    assert main([*words, "--image", "image", "--caption", "short", "long"]) == 0
    records = [json.loads(members["json"]) for members in members_in(tmp_path / "o").values()]
    assert records[0]["captions"] == [
        {"text": "a", "kind": "short"},
        {"text": "one", "kind": "long"},
        {"text": "two", "kind": "long"},
    ]
    assert records[1] == {"captions": [{"text": "b", "kind": "short"}], "hdm_caption": "x", "source": "t.parquet#1"}
    rules = CaptionRules(kinds={"long": 1.0}, drop=0.0)
    config = kit.stream_config(tmp_path / "o", captions=rules)
    assert {each.caption for each in stream(config, kit.letters, stop=60)} == {"one", "two", "b", "three"}


def test_what_cannot_be_used_is_named_with_its_reason(kit, tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    cells = [
        ({"bytes": kit.coloured(1), "path": None}, "good", None),
        ({"bytes": None, "path": "/etc/passwd"}, "x", "the row names a file but does not contain it"),
        ({"bytes": b"", "path": None}, "x", "the row contains no image"),
        (None, "x", "the row contains no image"),
        ({"bytes": b"<html>", "path": None}, "x", "undecodable image"),
        ({"bytes": bomb.getvalue(), "path": None}, "x", "too many pixels"),
        ({"bytes": kit.coloured(2), "path": None}, "", "no caption"),
        ({"bytes": kit.coloured(3), "path": None}, "\u200b\u2800", "no caption"),
        ({"bytes": kit.coloured(4), "path": None}, "x" * 70_000, "caption too long"),
        ({"bytes": kit.coloured(5), "path": None}, "bell \x07 \x1b[2J", None),
    ]
    file = write(
        tmp_path / "t\x1b.parquet",
        {
            "image": [image for image, _, _ in cells],
            "text": [text for _, text, _ in cells],
            "score": [float("nan")] * len(cells),
            "blob": [b"x"] * len(cells),
        },
    )
    report = build(file, tmp_path / "out", Columns("image", ("text",)))
    assert report.samples == 2 and len(report.rejected) == sum(reason is not None for _, _, reason in cells)
    for row, (_, _, reason) in enumerate(cells):
        told = dict(report.rejected).get(f"t\x1b.parquet#{row}")
        assert told is None if reason is None else told.startswith(reason)
    found = list(members_in(tmp_path / "out").values())
    assert [json.loads(each["json"]) for each in found] == [{"source": f"t\x1b.parquet#{row}"} for row in (0, 9)]
    assert "\x1b" not in (tmp_path / "out" / "rejected.tsv").read_text()
    report = build(file, tmp_path / "more", Columns("image"), allow_missing=True)
    assert report.samples == 5


def test_columns_that_hold_no_images_are_refused_with_the_way_to_fetch_them(table, capsys, tmp_path):
    words = ["build", "parquet", str(table), "--out", str(tmp_path / "o"), "--caption", "text"]
    assert main([*words, "--image", "text"]) == 2
    assert "img2dataset" in capsys.readouterr().err
    assert main([*words, "--image", "aesthetic"]) == 2 and "double" in capsys.readouterr().err
    assert main([*words, "--image", "pictur"]) == 2 and "did you mean 'picture'?" in capsys.readouterr().err
    assert main([*words[:5], "--image", "picture"]) == 2 and "--allow-missing" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not PAR1")
    for place in ("empty", "no.parquet", "nowhere"):
        assert main([*words[:2], str(tmp_path / place), *words[3:], "--image", "picture"]) == 2
        assert place in capsys.readouterr().err
    assert not list((tmp_path / "o").glob("*.tar"))


def test_damage_in_the_middle_of_a_file_stops_the_build_and_a_mended_file_goes_on(table, tmp_path, capsys):
    whole = (table / "1.parquet").read_bytes()
    place = whole.rindex(b"\x89PNG", 0, len(whole) // 2)
    (table / "1.parquet").write_bytes(whole[:4] + os.urandom(place) + whole[4 + place :])
    with pytest.raises(UserError, match="cannot be read") as raised:
        build(table, tmp_path / "out")
    assert raised.value.where.endswith("1.parquet")
    (table / "1.parquet").write_bytes(whole)
    said = []
    build(table, tmp_path / "out", say=said.append)
    build(table, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") and "rebuilt" in said[0]


def test_a_build_that_was_killed_goes_on_and_gives_the_same_bytes(table, tmp_path):
    build(table, tmp_path / "whole")
    pid = os.fork()
    if pid == 0:
        note, seen = ShardJournal.note, []

        def dying(journal, **row):
            note(journal, **row)
            seen.append(1)
            if len(seen) == 2:
                os._exit(9)

        ShardJournal.note = dying
        build(table, tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    second = (tmp_path / "out" / "shard-00001.tar").stat().st_mtime_ns
    said = []
    build(table, tmp_path / "out", say=said.append)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") and "2 shards, which are kept" in said[0]
    assert (tmp_path / "out" / "shard-00001.tar").stat().st_mtime_ns == second
    (tmp_path / "out" / "shard-00002.tar").unlink()
    build(table, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    with pytest.raises(UserError, match="other options"):
        build(table, tmp_path / "out", allow_missing=True)
    (table / "1.parquet").unlink()
    with pytest.raises(UserError, match="another"):
        build(table, tmp_path / "out")


def test_a_column_that_is_there_twice_is_refused(kit, tmp_path):
    columns = [pa.array([kit.coloured(1)]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.table(columns, names=["picture", "text", "text"]), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="2 columns 'text'"):
        build(tmp_path / "t.parquet", tmp_path / "out")


@pytest.mark.parametrize("rows", [3, 11, 13, 40])
def test_a_table_of_another_number_of_rows_is_built_again_whatever_its_time_and_size_say(kit, table, tmp_path, rows):
    build(table, tmp_path / "out")
    state = ParquetTable([str(table)], PICTURES).state
    columns = {"picture": [kit.coloured(13 + row) for row in range(rows)], "text": ["new"] * rows}
    write(table / "1.parquet", columns, row_group_size=5)
    changed = ParquetTable([str(table)], PICTURES)
    changed.state = state
    build_rows(changed, tmp_path / "out", samples_per_shard=7, threads=1)
    captions = [members["txt"] for members in members_in(tmp_path / "out").values()]
    assert len(captions) == 13 + rows and captions[21:] == [b"new"] * max(0, rows - 8)


def data_set(kit, folder):
    """A folder as `datasets` writes it: 25 rows in two files, features that say which column holds images."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "score": datasets.Value("float32")}
    )
    columns = {
        "image": [{"bytes": kit.coloured(row), "path": None} for row in range(25)],
        "text": [f"number {row}" for row in range(25)],
        "score": [float(row) for row in range(25)],
    }
    whole = datasets.Dataset.from_dict(columns, features=features)
    (folder / "data").mkdir(parents=True)
    for number, part in enumerate((range(13), range(13, 25))):
        whole.select(part).to_parquet(folder / "data" / f"train-{number:05d}-of-00002.parquet")
    return folder


def check_hub_build(kit, name, out):
    words = ["build", "hub", name, "--caption", "text", "--samples-per-shard", "10", "--threads", "1"]
    assert main([*words, "--out", str(out)]) == 0
    found = members_in(out)
    assert [members["png"] for members in found.values()] == [kit.coloured(row) for row in range(25)]
    assert [members["txt"] for members in found.values()] == [f"number {row}".encode() for row in range(25)]
    record = json.loads(found["00000024"]["json"])
    assert record == {"score": 24.0, "source": f"{name}#24"}


def test_a_folder_laid_out_like_a_data_set(kit, tmp_path, capsys):
    place = data_set(kit, tmp_path / "set")
    check_hub_build(kit, str(place), tmp_path / "out")
    first = digests(tmp_path / "out")
    (tmp_path / "out" / "shard-00001.tar").unlink()
    check_hub_build(kit, str(place), tmp_path / "out")
    assert digests(tmp_path / "out") == first
    words = ["build", "hub", str(place), "--out", str(tmp_path / "o"), "--caption", "text"]
    for more, told in (
        (["--split", "trai"], "did you mean 'train'?"),
        (["--image", "imag"], "did you mean 'image'?"),
        (["--image", "text"], "img2dataset"),
    ):
        capsys.readouterr()
        assert main([*words, *more]) == 2 and told in capsys.readouterr().err


def test_code_in_a_data_set_is_not_run(kit, tmp_path):
    place = tmp_path / "evil"
    place.mkdir()
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError):
        HubTable(str(place), Columns("image", ("text",)))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def stand_in(kit, tmp_path, monkeypatch):
    """A hub on loopback with the data set OWNER/SET, as `datasets` sees it, too."""
    import datasets

    place = data_set(kit, tmp_path / "set")
    with hub.standing_in(tmp_path / "cache") as found:
        files = (file for file in place.rglob("*") if file.is_file())
        found.files["OWNER/SET"] = {str(file.relative_to(place)): file.read_bytes() for file in files}
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", found.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False, raising=False)
        monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "sets"))
        yield found


def test_a_data_set_of_the_hub_is_streamed_at_one_commit(kit, stand_in, tmp_path):
    check_hub_build(kit, "OWNER/SET", tmp_path / "out")
    with pytest.raises(UserError, match="cannot be read") as raised:
        HubTable("OWNER/NOTHING", Columns("image", ("text",)))
    assert "hf download" in raised.value.hint


def test_without_the_packages_the_extra_is_named(table, tmp_path, monkeypatch):
    for package in ("pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    for make in (lambda: ParquetTable([str(table)], Columns("picture")), lambda: HubTable("A/B", Columns("image"))):
        with pytest.raises(UserError) as raised:
            make()
        assert "hdm-lightning[tables]" in raised.value.hint
