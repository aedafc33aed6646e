"""The stand-in for web sets of experiments/broad_data: what the commands count of it, and its server."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.broad_data import counting
from experiments.broad_data.commands import ShardServer
from experiments.broad_data.layout import main as compare_layouts
from experiments.broad_data.run import KEEPS, LIMITS
from experiments.broad_data.stand_in import ERRORS, Sizes, imitate
from experiments.broad_data.web import DEAD, Web

from hdm_lightning.cli.shards import main
from hdm_lightning.data.index import load_index
from hdm_lightning.data.shard_bytes import read_range, read_whole

ROOT = Path(__file__).parents[2]
SIZES = Sizes(whole=150, as_they_are=150, killed=50, per_shard=50)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The web, and the folder that img2dataset would leave of it."""
    web = Web(ROOT / "data" / "openclipart-mini", seed=12)
    folder = tmp_path_factory.mktemp("web") / "set"
    imitate(web, folder, SIZES)
    return web, folder


@pytest.mark.parametrize("arguments", [[], ["one"], ["one", "two"]])
def test_folders_that_are_missing_are_refused_with_the_usage(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["layout.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        compare_layouts()
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_failed_addresses_are_counted_by_reason_and_the_killed_shard_is_named(stand_in, capsys):
    web, folder = stand_in
    assert main(["build", "img2dataset", str(folder), "--processes", "1"]) == 0
    said = capsys.readouterr().out
    answers = [web.address(number).answer for number in range(300)]
    resized = [answer in ("page", "half") and place < 150 for place, answer in enumerate(answers)]
    failed = sum(answer in DEAD and answer != "page" for answer in answers)
    good = 300 - failed - sum(resized)
    assert f"{good} of 300 downloads succeeded, {failed} failed, {sum(resized)} were unusable" in said
    assert f"  {answers.count('404')} failed: {ERRORS['404']}\n" in said
    assert "not finished: 00006.tar; to resume, delete index.json" in said
    assert f"  {answers[150:].count('page')} left out: undecodable image: this is a page of HTML" in said


def test_every_good_sample_counts_once_and_filters_keep_what_the_columns_say(stand_in, capsys):
    _, folder = stand_in
    found = counting.samples(folder)
    faults = Counter(each.fault for each in found)
    assert faults["no image"] and faults["half an image"] and faults["no text"], "the stand-in has lost its odd samples"
    assert main(["build", "img2dataset", str(folder), "--processes", "1"]) == 0
    assert main(["verify", "--decode", "--mark", str(folder)]) == 1
    assert load_index(folder).samples == faults[""]
    kept = [each for each in found if not each.fault]
    for limits, keeps in zip(LIMITS, KEEPS, strict=True):
        kept = [each for each in kept if keeps(each)]
        assert main(["filter", str(folder), "--mark", "--jobs", "1", *limits]) == 0
        assert load_index(folder).samples == len(kept) > 50
    capsys.readouterr()


def test_the_server_gives_ranges_counts_bytes_and_fails_three_times_in_a_hundred(tmp_path, monkeypatch):
    monkeypatch.setattr("hdm_lightning.data.shard_bytes.PAUSE_S", 0.0)
    content = bytes(range(256)) * 40
    (tmp_path / "a.tar").write_bytes(content)
    server = ShardServer(tmp_path)
    assert read_whole(f"{server.url}/a.tar", len(content)) == content
    for begin in range(0, 600, 2):
        assert read_range(f"{server.url}/a.tar", begin, begin + 9) == content[begin : begin + 9]
    server.shutdown()
    assert server.count["whole"] == 301 and 301 * 9 < server.count["bytes"] < len(content) * 2 + 320 * 9
    assert 2 <= server.count["error"] + server.count["broken_off"] <= 30
    assert server.count["requests"] == sum(server.count[each] for each in ("whole", "error", "broken_off"))
