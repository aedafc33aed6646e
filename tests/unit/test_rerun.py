"""The command that runs recorded experiments again: what it takes for moved, and what it finds in the records."""

import json
import math
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments import rerun

EXPERIMENTS = OmegaConf.to_container(OmegaConf.load(rerun.HERE / "rerun.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_rule_finds_numbers_in_the_record_which_has_not_moved_from_itself(name):
    folder = rerun.HERE / name
    for file, keys in EXPERIMENTS[name]["compare"].items():
        for key, rule in keys.items():
            found = rerun.compare(folder, folder, {file: {key: rule}})
            assert not [each for each in found if each.moved], key


def test_every_recorded_experiment_can_run_again():
    pages = {page.parent.name for page in rerun.HERE.glob("*/README.md")}
    assert pages - set(EXPERIMENTS) == {"gpu_record"} and set(EXPERIMENTS) <= pages


def test_the_limit_over_seeds_holds_nineteen_of_twenty_new_means():
    """Against drawing: recorded sets of 4 normal values, new ones of 3."""
    draw = random.Random(0)
    inside = 0
    for _ in range(4000):
        recorded, again = ([draw.gauss(5, 2) for _ in range(count)] for count in (4, 3))
        inside += abs(statistics.fmean(recorded) - statistics.fmean(again)) <= rerun.spread_limit(recorded, 3)
    assert inside / 4000 == pytest.approx(0.95, abs=3.5 * math.sqrt(0.95 * 0.05 / 4000))


def test_one_training_leaves_no_limit():
    assert rerun.spread_limit([0.3], 3) is None


@pytest.fixture
def folders(tmp_path):
    """Three trainings of loss 0.50 ± 0.02, recorded and copied as if they had come out the same."""
    recorded, again = tmp_path / "recorded", tmp_path / "again"
    recorded.mkdir()
    for seed, loss in enumerate((0.50, 0.52, 0.48)):
        content = {"loss": loss, "rows": [{"seconds": 10.0, "count": 7, "name": "a"}], "values": [1.0, 1.1, 0.9]}
        (recorded / f"narrow-seed{seed}.json").write_text(json.dumps(content))
    shutil.copytree(recorded, again)
    return recorded, again


def alter(folder, change):
    for path in folder.iterdir():
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


@pytest.mark.parametrize(("added", "moved"), [(0.069, False), (-0.069, False), (0.072, True), (-0.072, True)])
def test_a_mean_over_files_of_several_seeds_moves_where_the_seeds_do_not_explain_it(folders, added, moved):
    """Student's t of two degrees of freedom is 4.3027: means may differ by 4.3027 · 0.02 · √(1/3 + 1/3) = 0.0703."""
    recorded, again = folders
    alter(again, lambda content: content.update(loss=content["loss"] + added))
    (row,) = rerun.compare(recorded, again, {"*.json": {"loss": "seeds"}})
    assert row.limit == pytest.approx(0.070263, rel=1e-4)
    assert (row.recorded, row.moved) == (pytest.approx(0.5), moved)


@pytest.mark.parametrize(
    ("key", "rule", "change", "moved"),
    [
        ("rows.*.count", "exactly", {"count": 7}, 0),
        ("rows.*.count", "exactly", {"count": 8}, 1),
        ("rows.0.name", "exactly", {"name": "b"}, 1),
        ("rows.*.seconds", 0.2, {"seconds": 11.9}, 0),
        ("rows.*.seconds", 0.2, {"seconds": 12.1}, 1),
        ("rows.*.seconds", 0.2, {"seconds": 7.9}, 1),
        ("**", 0.2, {"seconds": 12.1, "count": 9}, 2),
    ],
)
def test_counts_are_held_exactly_and_times_to_their_share(folders, key, rule, change, moved):
    recorded, again = folders
    alter(again, lambda content: content["rows"][0].update(change))
    found = rerun.compare(recorded, again, {"narrow-seed0.json": {key: rule}})
    assert sum(row.moved for row in found) == moved


def test_what_is_not_there_again_is_an_error(folders):
    recorded, again = folders
    alter(again, lambda content: content.pop("loss"))
    with pytest.raises(ValueError, match="loss is recorded, but missing from the new"):
        rerun.compare(recorded, again, {"*.json": {"loss": "seeds"}})


def test_what_is_recorded_and_no_command_writes_again_is_not_compared_with_itself(tmp_path):
    tree, what = (
        rerun.copied(tmp_path / "tree", fresh=False),
        {"compare": {"*.json": {"**": 0.1}}, "commands": ["true"]},
    )
    assert rerun.run("plans", what, tree) is None
    with pytest.raises(ValueError, match="is recorded, but missing from the new results"):
        rerun.compare(rerun.HERE / "plans", tree / "experiments" / "plans", what["compare"])


def test_one_that_cannot_be_compared_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rerun", "plans", "wiring", "--tree", str(tmp_path / "tree")])
    monkeypatch.setattr(rerun, "run", lambda name, what, tree: None)
    plain = rerun.compare
    monkeypatch.setattr(
        rerun, "compare", lambda old, new, rules: plain(old, tmp_path if "plans" in str(old) else new, rules)
    )
    with pytest.raises(SystemExit) as ended:
        rerun.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert "missing from the new results" in report["plans"]["failed"] and report["wiring"]["numbers"]
    assert ended.value.code == 1 and "wiring: 0 of" in capsys.readouterr().out


def test_a_copy_that_was_interrupted_is_made_again(tmp_path, monkeypatch):
    def interrupted(source, place, ignore):
        (place / "plans").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rerun.copied(tmp_path / "tree", fresh=False)
    assert (rerun.copied(tmp_path / "tree", fresh=False) / "experiments" / "rerun.yaml").is_file()


def test_chance_is_spoken_of_where_seeds_make_the_limit(folders):
    recorded, again = folders
    alter(again, lambda content: content.update(loss=9.0, count=8))
    alter(again, lambda content: content["rows"][0].update(seconds=99.0))
    for rules, chance in (({"rows.*.seconds": 0.1}, False), ({"loss": "seeds"}, True)):
        found = rerun.compare(recorded, again, {"narrow-seed*.json" if chance else "narrow-seed0.json": rules})
        assert ("move by chance" in rerun.summary("x", None, found)) == chance


def test_commands_are_passed_over_once_they_are_done_and_the_record_stays(tmp_path):
    """One that fails is tried again, those before it are not."""
    tree = rerun.copied(tmp_path / "tree", fresh=False)
    count, broken = "echo x >> count.txt", "test -e mended"
    what = {"fresh": ["results"], "commands": [count, broken, "rm experiments/synergy/README.md"]}
    assert rerun.run("synergy", what, tree) == broken
    (tree / "mended").touch()
    assert rerun.run("synergy", what, tree) is None
    assert (tree / "count.txt").read_text() == "x\n"
    assert not (tree / "experiments" / "synergy" / "results").exists()
    assert (rerun.HERE / "synergy" / "README.md").exists()
    assert list((rerun.HERE / "synergy" / "results").iterdir())


@pytest.mark.slow
def test_the_forecasts_run_again_are_those_of_the_record(tmp_path):
    command = [sys.executable, "-m", "experiments.rerun", "plans", "--tree", str(tmp_path / "tree")]
    done = subprocess.run(command, cwd=rerun.HERE.parent, capture_output=True, text=True, check=False)
    assert "plans: 0 of " in done.stdout
    assert done.returncode == 0
    assert json.loads((tmp_path / "report.json").read_text())["plans"]["numbers"]
