"""Filtering shards: bounds of what is measured and of scores, what is lacking, near copies, and calls that go on."""

import json
import os
import re
import time

import numpy as np
import pytest
from experiments.near_duplicate_search import robustness
from PIL import Image, ImageDraw

from hdm_lightning.cli.shards import main
from hdm_lightning.data.index import load_index
from hdm_lightning.data.inspection import collect
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.data.verification import Problem, leave_out
from hdm_lightning.datasets import filtering, near_duplicates
from hdm_lightning.datasets.filter_rules import Filter, Lacking, Rule, Seen, reasons_of
from hdm_lightning.datasets.filtering import FilteredSet
from hdm_lightning.datasets.near_duplicates import better_copies, bit_count, perceptual_hash
from hdm_lightning.errors import UserError


@pytest.mark.parametrize("first", [["--min", "pixels=1e12"], ["--min", "wdith=1"]], ids=["nothing stays", "mistyped"])
def test_a_filter_that_came_to_nothing_leaves_its_folder_to_another(kit, tmp_path, capsys, first):
    source, out = kit.write_shards(tmp_path / "s", [3, 2]), tmp_path / "out"
    assert main(["filter", str(source), "--out", str(out), *first]) == 2
    assert main(["filter", str(source), "--out", str(out), "--min", "width=1"]) == 0
    assert load_index(out).samples == 5
    assert main(["filter", str(source), "--out", str(out), *first]) == 2
    assert "by other rules" in capsys.readouterr().err and load_index(out).samples == 5


@pytest.mark.parametrize("place", ["s/x", "s/a/b", "s", "link/x"])
def test_a_set_among_the_shards_that_it_is_made_of_is_refused(kit, tmp_path, capsys, place):
    """The next index of the source would count its samples twice."""
    source = kit.write_shards(tmp_path / "s", [3, 2])
    (tmp_path / "link").symlink_to(source)
    assert main(["filter", str(source), "--out", str(tmp_path / place), "--min", "width=1"]) == 2
    assert "is inside" in capsys.readouterr().err or place == "s"
    assert len(index_shards(source).shards) == 2 and not list(source.rglob("*/"))[1:]


def test_a_set_that_an_earlier_version_began_among_its_source_is_continued_once_it_is_moved(kit, tmp_path, capsys):
    source, out = kit.write_shards(tmp_path / "s", [3, 2]), tmp_path / "out"
    words = ["filter", str(source), "--min", "width=1", "--out"]
    assert main([*words, str(out)]) == 0
    journal = (out / "filter.jsonl").read_text()
    out.rename(source / "old")
    assert main([*words, str(source / "old")]) == 2 and "move the content of this one there" in capsys.readouterr().err
    (source / "old").rename(out)
    assert main([*words, str(out)]) == 0 and (out / "filter.jsonl").read_text() == journal


def in_turn(hashes, order, distance):
    """The definition, pair by pair."""
    found = []
    for number, one in enumerate(hashes.tolist()):
        near = [k for k, other in enumerate(hashes.tolist()) if (one ^ other).bit_count() <= distance]
        better = [k for k in near if order[k] < order[number]]
        found.append(min(better, key=lambda k: order[k], default=-1))
    return found


def clustered(random, count):
    """Hashes some bits away from a few centres."""
    centres = random.integers(0, 1 << 64, size=max(1, count // 6), dtype=np.uint64)
    hashes = centres[random.integers(0, len(centres), count)].copy()
    for number in range(count):
        for bit in random.integers(0, 64, random.integers(0, 9)):
            hashes[number] ^= np.uint64(1) << np.uint64(bit)
    return hashes


@pytest.mark.parametrize("largest", [4096, 5], ids=["flat", "searched again"])
@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, 12])
def test_the_search_finds_what_comparing_all_pairs_finds(distance, largest, monkeypatch):
    monkeypatch.setattr(near_duplicates, "LARGEST_GROUP", largest)
    random = np.random.default_rng(distance)
    for count in (1, 2, 7, 60, 120):
        hashes, order = clustered(random, count), random.permutation(count)
        assert better_copies(hashes, order, distance).tolist() == in_turn(hashes, order, distance)


def test_hashes_that_agree_in_half_of_their_bits_do_not_cost_the_square_of_their_number(monkeypatch):
    """Twenty thousand that agree in half of their bits: compared in turn, two hundred million pairs for many masks."""
    monkeypatch.setattr(near_duplicates, "LARGEST_GROUP", 256)
    random, pairs, count = np.random.default_rng(0), [], near_duplicates.bit_count
    hashes = random.integers(0, 1 << 32, size=20_000, dtype=np.uint64) << np.uint64(32)

    def counted(numbers):
        pairs.append(len(numbers))
        return count(numbers)

    monkeypatch.setattr(near_duplicates, "bit_count", counted)
    better_copies(hashes, random.permutation(len(hashes)), 4)
    assert sum(pairs) < len(hashes) ** 2 / 2 / 10


def test_bits_are_counted():
    numbers = np.random.default_rng(1).integers(0, 1 << 64, size=1000, dtype=np.uint64)
    assert bit_count(numbers).tolist() == [number.bit_count() for number in numbers.tolist()]


SCORES = [
    {"aesthetic": 5.5, "pwatermark": 0.1, "NSFW": "UNLIKELY"},
    {"aesthetic": "6.5", "pwatermark": 0.9, "NSFW": "unlikely"},
    {"aesthetic": 4.0, "pwatermark": 0.2, "NSFW": "NSFW"},
    {"aesthetic": float("nan"), "pwatermark": 0.2},
    {"pwatermark": 0.2, "NSFW": None},
    {"aesthetic": "good", "scores": {"clip": 0.3}},
    {"aesthetic": True},
    {"aesthetic": 5, "pwatermark": 0.5, "scores": {"clip": 0.2}},
    {"aesthetic": "1e999"},
]


@pytest.fixture
def scored(kit, tmp_path):
    """Nine samples with scores, one with a broken record, one without any, in two shards."""
    records = [json.dumps(each).encode() for each in SCORES] + [b'{"aesthetic": 9', None]
    for shard, part in enumerate((records[:6], records[6:])):
        entries = []
        for number, record in enumerate(part, start=6 * shard):
            entries.append((f"{number:03d}.png", kit.coloured(number, width=16 + 8 * number, height=16)))
            entries.append((f"{number:03d}.txt", b"word " * number + b"end"))
            entries += [(f"{number:03d}.json", record)] if record is not None else []
        kit.write_tar(tmp_path / "set" / f"{shard:03d}.tar", entries)
    index_shards(tmp_path / "set")
    return tmp_path / "set"


def stays(place, *rules, **more):
    judgement = FilteredSet(str(place), Filter(rules, **more)).judge()
    rows = [number for number, code in enumerate(np.concatenate(judgement.codes).tolist()) if not code]
    return rows, judgement


def test_scores_are_compared_as_numbers_however_they_are_written(scored):
    rows, judgement = stays(scored, Rule("aesthetic", least=5))
    assert rows == [0, 1, 7]
    assert judgement.left_out == {"aesthetic below 5": 1, "no aesthetic": 3, "aesthetic is not a number": 4}
    rows, judgement = stays(scored, Rule("aesthetic", least=5), Rule("pwatermark", most=0.5))
    assert rows == [0, 7] and judgement.left_out["pwatermark above 0.5"] == 1
    rows, judgement = stays(scored, Rule("aesthetic", least=5), keep_lacking=True)
    assert rows == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert judgement.lacking == {"no aesthetic": 3, "aesthetic is not a number": 4}
    assert stays(scored, Rule("scores.clip", least=0.25))[0] == [5]


def test_what_is_lacking_has_one_name_whether_the_sample_is_kept_or_left_out(kit, tmp_path):
    """Also where the key itself sounds like a reason, and for sizes that are not known."""
    records = (b'{"no number": 5, "not a number": 5}', b"{}")
    entries = [
        (f"{n}.{end}", data) for n, r in enumerate(records) for end, data in (("png", kit.coloured(n)), ("json", r))
    ]
    kit.write_tar(tmp_path / "0.tar", entries)
    index_shards(tmp_path)
    for key in ("no number", "not a number"):
        assert stays(tmp_path, Rule(key, least=1))[1].left_out == {f"no {key}": 1}
        assert stays(tmp_path, Rule(key, least=1), keep_lacking=True)[1].lacking == {f"no {key}": 1}
    with pytest.raises(Lacking) as caught:
        Rule("width", least=1).keeps(Seen(0, 0))
    assert str(caught.value) in reasons_of([Rule("width", least=1)])


def test_values_are_compared_as_words(scored):
    assert stays(scored, Rule("NSFW", among=("unlikely", "unsure")))[0] == [0, 1]
    rows, judgement = stays(scored, Rule("NSFW", among=("nsfw",), wanted=False))
    assert rows == [0, 1] and judgement.left_out == {"NSFW is one of nsfw": 1, "no NSFW": 8}
    assert stays(scored, Rule("aesthetic", among=("true", "5"), wanted=True))[0] == [6, 7]


def test_sides_and_captions_are_measured(scored):
    assert stays(scored, Rule("long_side", least=32), Rule("aspect", most=4))[0] == [2, 3, 4, 5, 6]
    assert stays(scored, Rule("caption_words", least=3), Rule("caption_words", most=5))[0] == [2, 3, 4]
    assert stays(scored, Rule("caption_letters", most=8))[0] == [0, 1]


def test_a_key_that_no_sample_has_is_a_mistake_with_the_next_one_named(scored, capsys):
    words = ["filter", str(scored), "--dry-run", "--jobs", "1"]
    assert main([*words, "--min", "asthetic=5"]) == 2
    assert "did you mean 'aesthetic'?" in capsys.readouterr().err
    for wrong in (["--min", "aesthetic"], ["--min", "aesthetic=x"], ["--max", "a=nan"], ["--is", "NSFW"], []):
        assert main([*words, *wrong]) == 2
    assert main([*words, "--near-duplicates", "13"]) == 2 and main([*words, "--against", str(scored)]) == 2
    assert main([*words[:2], "--min", "aesthetic=5"]) == 2  # neither --out nor --mark


def test_the_command_writes_shards_whose_samples_are_the_same_bytes(scored, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["filter", str(scored), "--out", str(out), "--jobs", "1", "--min", "aesthetic=5", "--max", "pwatermark=0.5"]
    before = {file.name: file.read_bytes() for file in scored.iterdir()}
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "11 samples: 2 kept, 9 left out" in told and "  1 left out: pwatermark above 0.5" in told
    assert told.count(str(tmp_path / "out")) == 1  # in the path of the list of those left out
    assert {file.name: file.read_bytes() for file in scored.iterdir()} == before
    index = load_index(out)
    assert [(shard.name, shard.samples) for shard in index.shards] == [("000.tar", 1), ("001.tar", 1)]
    assert (out / "rejected.tsv").read_text().splitlines()[0] == "000.tar#1\tpwatermark above 0.5"
    first = (out / "000.tar").read_bytes()
    assert b'"aesthetic": 5.5' in first and b"000.png" in first and b"001.png" not in first
    assert main(words) == 0 and (out / "000.tar").read_bytes() == first
    assert main([*words[:-1], "pwatermark=0.6"]) == 2 and "by other rules" in capsys.readouterr().err


def test_marks_are_honoured_by_the_index_and_taken_back_by_a_new_one(scored, capsys):
    assert main(["filter", str(scored), "--mark", "--jobs", "1", "--min", "aesthetic=5"]) == 0
    assert load_index(scored).samples == 3
    left_out = collect([str(scored)]).left_out
    assert left_out == {"no aesthetic": 3, "aesthetic is not a number": 4, "aesthetic below 5": 1}
    assert main(["filter", str(scored), "--mark", "--jobs", "1", "--min", "aesthetic=6"]) == 0
    assert load_index(scored).samples == 1
    assert main(["filter", str(scored), "--mark", "--jobs", "1", "--min", "aesthetic=9"]) == 2
    assert load_index(scored).samples == 1 and "no sample is kept" in capsys.readouterr().err
    index_shards(scored)
    assert load_index(scored).samples == 11


def test_what_the_index_knows_is_judged_without_reading_a_shard(scored):
    for file in scored.glob("*.tar"):
        file.unlink()
    assert stays(scored, Rule("short_side", least=16), Rule("width", most=24))[0] == [0, 1]


def picture(number, size=(96, 64)):
    """A drawing of its own for each number."""
    random = np.random.default_rng(number)
    image = Image.new("RGB", (96, 64), tuple(random.integers(0, 255, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        box = [int(each) for each in (*random.integers(0, 60, 2), *random.integers(61, 96, 2))]
        draw.rectangle(box, fill=tuple(random.integers(0, 255, 3).tolist()))
    return image.resize(size, Image.Resampling.LANCZOS)


def set_of(kit, folder, images):
    kit.write_tar(folder / "000.tar", [(f"{number:03d}.{name}", data) for number, (name, data) in enumerate(images)])
    index_shards(folder)
    return folder


def test_of_near_copies_the_one_with_most_pixels_stays_and_other_sets_come_first(kit, tmp_path):
    images = [("png", kit.encoded(picture(number))) for number in range(8)]
    images += [
        ("jpg", kit.encoded(picture(2, (192, 128)), "JPEG", quality=80)),
        ("webp", kit.encoded(picture(3, (60, 40)), "WEBP")),
    ]
    images += [("png", images[4][1]), ("png", images[5][1][:200])]
    folder = set_of(kit, tmp_path / "set", images)
    rows, judgement = stays(folder, distance=4)
    assert rows == [0, 1, 3, 4, 5, 6, 7, 8]  # 2 is smaller than 8; 9 than 3; 10 is 4 again; 11 is cut
    assert judgement.left_out == {
        "its image cannot be decoded, so it cannot be compared": 1,
        "near copy of a larger or earlier image": 3,
    }
    others = set_of(kit, tmp_path / "others", [("jpg", kit.encoded(picture(6, (48, 32)), "JPEG")), ("png", b"")])
    judgement = FilteredSet(str(folder), Filter(distance=4), against=[str(others)]).judge()
    assert judgement.left_out["near copy of an image of --against"] == 1 and judgement.codes[0][6]
    assert load_index(others).samples == 1
    # what breaks a rule is no better copy
    rows, _ = stays(folder, Rule("width", most=100), distance=4)
    assert rows == [0, 1, 2, 3, 4, 5, 6, 7]


def test_the_hash_is_that_of_imagehash_for_small_images(kit):
    import imagehash

    for number in range(5):
        image = picture(number)
        assert perceptual_hash(kit.encoded(image)) == int(str(imagehash.phash(image)), 16)


def test_the_study_of_changed_copies_runs_on_a_set(kit, tmp_path, monkeypatch):
    folder = set_of(kit, tmp_path / "set", [("png", kit.encoded(picture(number))) for number in range(2)])
    monkeypatch.setattr("sys.argv", ["robustness.py", str(folder), "--out", str(tmp_path / "found.json")])
    robustness.main()
    found = json.loads((tmp_path / "found.json").read_text())
    within = list(found["copies_within_bits"].values())
    assert found["images"] == 2 and len(within) == 4
    assert all(max(counts.values()) == 2 for counts in within[:3])


def test_a_call_that_was_killed_goes_on_with_the_next_shard(kit, tmp_path, monkeypatch):
    folder = kit.write_shards(tmp_path / "set", [4, 4, 4])
    wanted = Filter((Rule("number", least=2),))
    FilteredSet(str(folder), wanted).write(tmp_path / "whole")
    pid = os.fork()
    if pid == 0:
        judged, seen = filtering.judged_shard, []
        filtering.judged_shard = lambda *given: (seen.append(1), os._exit(9) if len(seen) > 2 else judged(*given))[1]
        FilteredSet(str(folder), wanted).write(tmp_path / "out")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    judged, seen = filtering.judged_shard, []

    def noted(wanted, shard):
        seen.append(shard.record.name)
        return judged(wanted, shard)

    monkeypatch.setattr(filtering, "judged_shard", noted)
    FilteredSet(str(folder), wanted).write(tmp_path / "out")
    assert seen == ["002.tar"]
    files = sorted(file.name for file in (tmp_path / "whole").glob("[!.]*"))
    assert files == ["000.tar", "001.tar", "002.tar", "filter.jsonl", "index.json", "rejected.tsv"]
    for name in files:
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("out", "whole"))
        assert name == "filter.jsonl" or one == other


def test_hostile_records_take_no_time_and_steer_no_terminal(kit, tmp_path, capsys):
    record = {"\x1b[2Jevil": 1, "aesthetic": "9" * 100_000, **{f"k{number}": number for number in range(5000)}}
    entries = [("a.png", kit.coloured(1)), ("a.json", json.dumps(record).encode())]
    entries += [("b.png", kit.coloured(2)), ("b.json", b'{"aesthetic": ' + b"[" * 50_000)]
    entries += [("c.png", kit.coloured(3)), ("c.json", b'{"aesthetic": 7}')]
    entries += [("d.png", kit.coloured(4)), ("d.json", b'{"aesthetic": ' + b"1" * 5000 + b"}")]
    kit.write_tar(tmp_path / "set" / "0.tar", entries)
    index_shards(tmp_path / "set")
    begin = time.monotonic()
    assert main(["filter", str(tmp_path / "set"), "--dry-run", "--jobs", "1", "--min", "aesthetic=5"]) == 0
    assert main(["filter", str(tmp_path / "set"), "--dry-run", "--jobs", "1", "--min", "\x1b[2Jevl=5"]) == 2
    said = capsys.readouterr()
    assert "4 samples: 1 kept" in said.out and "\x1b" not in said.out + said.err
    assert time.monotonic() - begin < 20


def test_a_sample_that_cannot_be_copied_ends_the_call_and_the_hint_helps(kit, tmp_path):
    """Rules about sizes read no sample, so that damage shows when it is copied."""
    folder = kit.write_shards(tmp_path / "set", [4, 4])
    shard = folder / "001.tar"
    data = bytearray(shard.read_bytes())
    data[516:536] = bytes(20)  # in the first member
    shard.write_bytes(data)
    words = ["filter", str(folder), "--out", str(tmp_path / "out"), "--min", "height=1"]
    assert main(words) == 2
    with pytest.raises(UserError) as caught:
        FilteredSet(str(folder), Filter((Rule("height", least=1),))).write(tmp_path / "other")
    assert caught.value.where == str(shard) and "verify" in caught.value.hint
    command = re.search(r"hdm-shards (verify \S+ --decode --mark)", caught.value.hint)[1]
    main(command.split())
    assert main([*words[:3], str(tmp_path / "again"), *words[4:]]) == 0
    assert load_index(tmp_path / "again").samples == 7


def test_the_sample_that_cannot_be_copied_is_named_as_in_its_shard(kit, tmp_path):
    """Not by its row among the samples that are not left out."""
    folder = kit.write_shards(tmp_path / "set", [4])
    shard, starts = folder / "000.tar", load_index(folder).shards[0].table().start
    data = bytearray(shard.read_bytes())
    data[starts[2] + 4 : starts[2] + 24] = bytes(20)
    shard.write_bytes(data)
    leave_out(folder, [Problem("000.tar", "marked by hand", 0)])
    with pytest.raises(UserError, match="sample 2 cannot"):
        FilteredSet(str(folder), Filter((Rule("height", least=1),))).write(tmp_path / "out")
