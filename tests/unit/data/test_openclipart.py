"""The Open Clip Art builder on drawings written for the purpose: what is kept, refused, said and drawn.

Last its journal, cut anywhere by a kill, and the committed set, which is what its note says it is.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdm_lightning.data.index import load_index
from hdm_lightning.datasets.openclipart import JOURNAL, Journal, OpenClipArtOptions, build_openclipart
from hdm_lightning.datasets.openclipart_captions import clean_title, describe
from hdm_lightning.datasets.openclipart_drawing import Miniatures
from hdm_lightning.datasets.openclipart_source import (
    EXCLUDED,
    Record,
    at_random,
    folders_in_turn,
    read_record,
    refusal,
)
from hdm_lightning.errors import UserError
from shard_contents import members_in

PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"
BALL = '<circle cx="50" cy="50" r="{r}" fill="{fill}"/>'


def svg(body, title="Ball", keywords=("toy", "round"), description="", licence=PUBLIC_DOMAIN, page="100mm 100mm"):
    width, height = page.split()
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 100 100"
 xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><metadata><rdf:RDF><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>Ann Draw</dc:title></cc:Agent></dc:creator>
<cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata>{body}</svg>"""


def ball(fill="#cc2222", r=20):
    return BALL.format(fill=fill, r=r)


@pytest.fixture
def collection(tmp_path):
    drawings = {
        "toys/ball.svg": svg(ball()),
        "toys/again.svg": svg(ball("#cc2222", 21), title="Another ball"),
        "toys/bar.svg": svg('<ellipse cx="40" cy="50" rx="30" ry="10" fill="#2222cc"/>', title="Bar"),
        "toys/long.svg": svg('<rect x="1" y="40" width="95" height="10" fill="#2222cc"/>', title="Rod"),
        "toys/blank.svg": svg("", title="Nothing"),
        "toys/flag.svg": svg('<rect x="10" y="10" width="60" height="40" fill="#22cc22"/>', title="Flag"),
        "toys/dot.svg": svg('<circle cx="50" cy="50" r="1"/>', title="Dot"),
        "toys/word.svg": svg('<text x="10" y="50">hello</text>', title="Word"),
        "toys/free.svg": svg(ball("#22cc22", 30), title="Free", licence="http://example.org/other"),
        "toys/broken.svg": "<svg><metadata>",
        "toys/huge.svg": svg(ball() + f"<!--{'x' * 600_001}-->", title="Huge"),
        "toys/toy_pistol.svg": svg(ball("#888888", 30), title="Water pistol"),
        "computer/icons/disk.svg": svg(ball(), title="Disk"),
        "shapes/stars/star_7.svg": svg(ball(), title="Star"),
        "special/gradients/grey.svg": svg(ball(), title="Grey"),
        "food/pie.svg": svg('<path d="M10 90 L90 90 L50 20 Z" fill="#cc8822"/>', title="Clipart by Ann - bun"),
    }
    for path, text in drawings.items():
        file = tmp_path / "svg" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "svg/toys/link.svg").symlink_to("ball.svg")
    return tmp_path / "svg"


def build(folder, collection, **options):
    return build_openclipart(
        folder, OpenClipArtOptions(**{"resolution": 64, **options}), source=collection, processes=1
    )


def outcomes(folder):
    lines = (folder / "drawings.tsv").read_text().splitlines()[1:]
    return dict(line.split("\t") for line in lines)


def test_every_refusal_has_its_reason(tmp_path, collection):
    tally = build(tmp_path / "out", collection, harmless=True, resolution=256)
    said = outcomes(tmp_path / "out")
    expected = {
        "toys/long.svg": "longer than 4:1",
        "toys/blank.svg": "blank",
        "toys/flag.svg": "a single color",
        "toys/dot.svg": "tiny on its page",
        "toys/word.svg": "holds text",
        "toys/free.svg": "not tagged public domain",
        "toys/broken.svg": "not well-formed",
        "toys/huge.svg": "larger than 600 kB",
        "toys/toy_pistol.svg": "word 'pistol'",
        "toys/link.svg": "symbolic link",
        "computer/icons/disk.svg": "icon theme",
        "shapes/stars/star_7.svg": "generated star",
        "special/gradients/grey.svg": "gradient",
    }
    for path, reason in expected.items():
        assert said[path].startswith(f"refused: {reason}"), (path, said[path])
    balls = sorted((said["toys/ball.svg"], said["toys/again.svg"]))
    assert balls == ["refused: duplicate", "shard openclipart-00000.tar"]
    assert tally["kept"] == 3 and sum(tally.values()) == len(said) == 17


def test_pictures_are_cropped_to_size_on_white(tmp_path, collection):
    build(tmp_path / "out", collection, harmless=True)
    bar = members_in(tmp_path / "out")["toys-bar"]
    picture = np.asarray(Image.open(io.BytesIO(bar["webp"])).convert("RGB")).astype(int)
    facts = json.loads(bar["json"])
    # 60 × 20 units with a white margin of 3% of 60 on each side.
    assert picture.shape[1] == 64 == facts["width"]
    assert picture.shape[0] == facts["height"] == pytest.approx(64 * 23.6 / 63.6, abs=1)
    assert np.abs(picture[0, 0] - 255).max() < 8
    assert np.abs(picture[12, 32] - [0x22, 0x22, 0xCC]).max() < 12


def test_short_side_can_be_the_measure(tmp_path, collection):
    build(tmp_path / "out", collection, side="short")
    for sample in members_in(tmp_path / "out").values():
        assert min(Image.open(io.BytesIO(sample["webp"])).size) == 64


def test_captions_and_truth(tmp_path, collection):
    build(tmp_path / "out", collection)
    sample = members_in(tmp_path / "out")["food-pie"]
    facts = json.loads(sample["json"])
    assert sample["txt"].decode() == "pie, toy, round, food"
    assert facts["captions"] == ["pie, toy, round, food", "pie"]
    assert facts["licence"] == "public domain" and facts["author"] == "Ann Draw"
    assert facts["source"].endswith("food/pie.svg")


def test_an_interrupted_build_goes_on_to_the_same_shards(tmp_path, collection, monkeypatch):
    build(tmp_path / "whole", collection, samples_per_shard=1)
    taken = []

    def stop_in_the_second_shard(done):
        taken.append(done)
        if done == 2:
            raise KeyboardInterrupt

    options = OpenClipArtOptions(resolution=64, samples_per_shard=1)
    with pytest.raises(KeyboardInterrupt):
        build_openclipart(tmp_path / "out", options, source=collection, processes=1, progress=stop_in_the_second_shard)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1
    build(tmp_path / "out", collection, samples_per_shard=1)
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_build_under_way_keeps_others_out_before_it_has_made_a_shard(tmp_path, collection):
    """Its journal is a header alone then, which by itself claims no folder."""
    other = OpenClipArtOptions(resolution=32)

    def begin_another(count):
        with pytest.raises(UserError, match="another process is building"):
            build_openclipart(tmp_path / "out", other, source=collection, processes=1)

    options = OpenClipArtOptions(resolution=16)
    build_openclipart(tmp_path / "out", options, source=collection, processes=1, progress=begin_another)
    with pytest.raises(UserError, match="other options"):
        build_openclipart(tmp_path / "out", other, source=collection, processes=1)


def test_other_options_do_not_go_on_and_old_shards_are_not_mixed_in(tmp_path, collection):
    build(tmp_path / "out", collection)
    with pytest.raises(UserError, match="other options"):
        build(tmp_path / "out", collection, seed=1)
    (tmp_path / "out/drawings.tsv").unlink()
    with pytest.raises(UserError, match="already holds"):
        build(tmp_path / "out", collection)


def test_count_stops(tmp_path, collection):
    assert build(tmp_path / "out", collection, count=2)["kept"] == 2
    assert len(members_in(tmp_path / "out")) == 2


def test_a_missing_source_says_what_to_install(tmp_path):
    for arguments in ({"source": tmp_path / "none"}, {"deb": tmp_path / "none.deb"}):
        with pytest.raises(UserError, match="openclipart-svg"):
            build_openclipart(tmp_path / "out", **arguments)
    (tmp_path / "no.deb").write_bytes(b"something else")
    with pytest.raises(UserError, match="not a Debian package"):
        build_openclipart(tmp_path / "out", deb=tmp_path / "no.deb")


def test_a_debian_package_is_unpacked_and_writes_nowhere_else(tmp_path, collection):
    outside = tmp_path / "outside"
    outside.mkdir()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as tar:
        tar.add(collection / "toys/bar.svg", "./usr/share/openclipart/svg/toys/bar.svg")
        tar.add(collection / "toys/bar.svg", "./usr/share/openclipart/svg/../../../../outside.svg")
        tar.add(collection / "toys/bar.svg", "./usr/share/doc/elsewhere.svg")
        for link, target in (("again.svg", "bar.svg"), ("out.svg", str(outside))):
            member = tarfile.TarInfo(f"./usr/share/openclipart/svg/toys/{link}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        tar.add(collection / "toys/bar.svg", "./usr/share/openclipart/svg/toys/out.svg/through.svg")
    content = inner.getvalue()
    parts = [("debian-binary", b"2.0\n"), ("odd", b"123"), ("data.tar.xz", content)]
    deb = b"!<arch>\n"
    for name, data in parts:
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    (tmp_path / "clips.deb").write_bytes(deb)
    tally = build_openclipart(
        tmp_path / "out", OpenClipArtOptions(resolution=32), deb=tmp_path / "clips.deb", processes=1
    )
    assert tally == {"kept": 1, "symbolic link": 1}
    assert not list(outside.iterdir())


def record(path="a/b.svg", title="", keywords=(), description="", author=""):
    return Record(path, title, description, author, keywords)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Cassa d&amp;#39;epoca", "Cassa d'epoca"),
        ("Crawfish (B and W)", "Crawfish black and white"),
        ("tree - RPG map elements", "tree"),
        ("arrow-left-green", "arrow left green"),
        ("Tasto 10", "Tasto"),
        ("filmPhoto1", "film Photo"),
        ("Part of the Flat Icon Collection (Wed Aug 25)", ""),
        ("Clipart by Nicu Buculei - piggybank", ""),
        ("12", ""),
    ],
)
def test_titles(raw, clean):
    assert clean_title(raw) == clean


def test_descriptions_of_drawings():
    words = describe(record("recreation/games/cards/simple/simple_d_6.svg", "card", ("card", "simple")))
    assert words.captions[0].startswith("six of diamonds, card, simple")
    words = describe(
        record(
            "animals/mammals/cow_ann_draw_01.svg",
            "Various Cliparts",
            ("hash", "animal", "0x935a", "Animal"),
            "Drawn in Inkscape",
            "Ann Drawson",
        )
    )
    assert words.captions == ("cow, animal, mammals", "cow") and not words.named
    words = describe(
        record(title="Eiffel Tower", keywords=("eiffeltower", "paris"), description="An outline of the tower")
    )
    assert words.captions == ("Eiffel Tower, paris, a", "Eiffel Tower", "An outline of the tower") and words.named


def test_harmless_means_whole_beginnings_of_words():
    for drawing in (record(title="Toy gun"), record(keywords=("weapons",)), record("a/tank_01.svg")):
        assert refusal(drawing), drawing
    for drawing in (record(title="Trombone"), record(title="Begun"), record("a/tankard.svg")):
        assert not refusal(drawing), drawing


def test_folders_take_turns():
    records = [record(f"{folder}/{i}.svg") for folder, n in (("big", 50), ("small", 2), ("mid", 5)) for i in range(n)]
    order = [r.folder for r in folders_in_turn(records, 3)]
    assert sorted(order[:3]) == sorted(order[3:6]) == ["big", "mid", "small"]
    assert sorted(order) == sorted(r.folder for r in records) and set(order[12:]) == {"big"}
    assert folders_in_turn(records[::-1], 3) == folders_in_turn(records, 3) != folders_in_turn(records, 4)
    assert at_random(records[::-1], 3) == at_random(records, 3)


def test_miniatures_know_a_picture_again():
    def encoded(array, **options):
        file = io.BytesIO()
        Image.fromarray(array).save(file, **options)
        return file.getvalue()

    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 255, (6, 8, 1)), np.ones((16, 16, 3))).astype(np.uint8)
    seen = Miniatures()
    assert seen.add(encoded(picture, format="PNG"))
    assert not seen.add(encoded(picture, format="WEBP", quality=80))
    assert seen.add(encoded(picture[::-1].copy(), format="PNG"))
    assert seen.add(encoded(picture[:, :64].copy(), format="PNG")) and len(seen) == 3


def test_records_stop_at_the_rdf(tmp_path):
    (tmp_path / "a.svg").write_text(svg(ball(), title="  A  b ", keywords=("", " x ")))
    found = read_record(tmp_path, "a.svg")
    assert (found.title, found.keywords, found.author, found.key) == ("A  b", ("x",), "Ann Draw", "a")


OPTIONS = {"seed": 0}
OUTCOMES = {"animals/c\u00e4t.svg": "shard openclipart-00000.tar", "animals/dog.svg": "refused: duplicate"}


def test_a_journal_that_was_cut_goes_on_from_its_last_whole_line(tmp_path):
    Journal(tmp_path, OPTIONS).record(OUTCOMES)
    whole = (tmp_path / JOURNAL).read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for cut in range(len(whole) + 1):
        (tmp_path / JOURNAL).write_bytes(whole[:cut])
        journal = Journal(tmp_path, OPTIONS)
        kept = sum(end <= cut for end in ends)
        assert list(journal.outcomes.items()) == list(OUTCOMES.items())[: max(0, kept - 1)], cut
        journal.record(dict(list(OUTCOMES.items())[len(journal.outcomes) :]))
        assert (tmp_path / JOURNAL).read_bytes() == whole, cut


def test_other_options_and_foreign_shards_are_refused(tmp_path):
    Journal(tmp_path, OPTIONS)
    Journal(tmp_path, {"seed": 1})  # nothing was made by the others
    Journal(tmp_path, OPTIONS).record({"a.svg": "refused: empty"})
    with pytest.raises(UserError, match="other options"):
        Journal(tmp_path, {"seed": 1})
    (tmp_path / JOURNAL).unlink()
    (tmp_path / "x.tar").touch()
    with pytest.raises(UserError, match="already holds"):
        Journal(tmp_path, OPTIONS)


COMMITTED = Path(__file__).parents[3] / "data/openclipart-mini"


def test_the_committed_set_has_its_size_and_an_index():
    index = load_index(str(COMMITTED / "index.json"))
    assert index.samples == 1000 and len(list(COMMITTED.glob("*.tar"))) == 4
    assert sum(file.stat().st_size for file in COMMITTED.iterdir()) <= 7_000_000


def test_the_committed_set_has_pictures_of_the_collection_with_their_captions():
    samples = members_in(COMMITTED)
    assert len(samples) == 1000
    aspects, seen = [], Miniatures()
    for key, sample in samples.items():
        picture, facts = Image.open(io.BytesIO(sample["webp"])), json.loads(sample["json"])
        assert max(picture.size) == 256 and picture.size == (facts["width"], facts["height"]), key
        assert sample["txt"].decode() == facts["captions"][0] and len(facts["captions"]) >= 2, key
        assert "&" not in facts["title"].replace("& ", "") and "_" not in sample["txt"].decode(), key
        assert facts["licence"] == "public domain"
        assert facts["source"].partition(": ")[2] not in EXCLUDED
        assert seen.add(sample["webp"]), key
        aspects.append(picture.width / picture.height)
    assert min(aspects) >= 1 / 4 and max(aspects) <= 4
    assert sum(a < 2 / 3 for a in aspects) > 100 and sum(a > 3 / 2 for a in aspects) > 100
