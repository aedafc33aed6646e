"""hdm-challenge: right answers score as such, what breaks a rule is refused, runs are counted from their folder."""

import copy
import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from composed import check_job, run_job
from hdm_lightning.cli import challenge, sample
from hdm_lightning.datasets.shapes import build_shapes
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation import challenge_entry
from hdm_lightning.evaluation.challenge_cost import Cost, autoencoder_run, count_run
from hdm_lightning.evaluation.challenge_tasks import SPLITS, TASKS
from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.operations import training_flops

PROMPTS, SCENES = 6, 48
STATED = ["--operations", "1e12", "--hours", "0.5", "--hardware", "a desk", "--commit", "abc", "--by", "me"]


@pytest.fixture
def task(monkeypatch):
    """The small task with few scenes and prompts."""
    few = dataclasses.replace(TASKS["small"], scenes=SCENES, prompts=PROMPTS)
    monkeypatch.setitem(TASKS, "small", few)
    return few


@pytest.fixture
def answers(task, tmp_path):
    """A folder of right answers to all prompts."""
    folder = tmp_path / "answers"
    folder.mkdir()
    scenes = [prompt for part in task.asked().values() for prompt in part]
    for number, prompt in enumerate(scenes):
        Image.fromarray(prompt.image(64)).save(folder / f"{number:04d}.png")
    return folder


@pytest.fixture
def board(answers, tmp_path):
    """A leaderboard with the right answers on it."""
    path = tmp_path / "board.json"
    assert enter(answers, path) == 0
    return path


def enter(images, board, name="right", stated=STATED):
    words = ["enter", "small", "--images", str(images), "--name", name, "--board", str(board), *stated]
    return challenge.main(words)


def test_the_recorded_leaderboard_stands_every_check(capsys):
    board = Path(__file__).parents[2] / "experiments" / "challenge" / "leaderboard.json"
    assert challenge.main(["board", str(board)]) == 0
    found = capsys.readouterr()
    assert "44.5%" in found.out and not found.err


def entry_of(board):
    return json.loads(board.read_text())["entries"][0]


def test_right_answers_are_right_and_answers_to_other_prompts_are_not(task, answers, board, tmp_path):
    scores = entry_of(board)["scores"]
    assert scores["headline"]["value"] >= 0.9
    assert scores["headline"]["low"] < scores["headline"]["value"] <= scores["headline"]["high"]
    assert min(scores[part]["colour"]["value"] for part, _, _ in SPLITS) >= 0.9
    shifted = tmp_path / "shifted"
    shifted.mkdir()
    count = len(task.captions())
    for number in range(count):
        shutil.copy(answers / f"{number:04d}.png", shifted / f"{(number + 1) % count:04d}-moved.png")
    assert enter(shifted, board, name="shifted") == 0
    moved = json.loads(board.read_text())["entries"][1]["scores"]["headline"]["value"]
    assert moved <= 0.1


def test_the_leaderboard_ranks_and_refuses_a_second_entry_of_a_name(answers, board, capsys):
    assert challenge.main(["board", str(board)]) == 0
    assert "right" in capsys.readouterr().out
    assert enter(answers, board) == 2
    assert "entry 'right' already exists" in capsys.readouterr().err
    assert len(json.loads(board.read_text())["entries"]) == 1


def changed(path, value):
    def change(entry):
        *way, last = path
        for key in way:
            entry = entry[key]
        entry[last] = value(entry[last]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(("version",), 0), "is not a complete entry"),
        (changed(("images_sha256",), ""), "no checksum of its images"),
        (changed(("task",), "tiny"), "is not a complete entry"),
        (changed(("scores", "headline", "value"), 1.5), "scores do not follow"),
        (changed(("outcomes", "unseen one", "right", "everything"), lambda old: [2, *old[1:]]), "are impossible"),
        (
            changed(("outcomes", "unseen one", "right", "everything"), lambda old: [1 - old[0], *old[1:]]),
            "do not follow",
        ),
        (changed(("outcomes", "unseen two", "units"), lambda old: old[::-1]), "not from the task's prompts"),
        (changed(("outcomes",), lambda old: {"unseen one": old["unseen one"]}), "does not have the parts"),
        (changed(("cost", "operations"), 4e13), "took 4e+13 operations, more than 3.5e+13"),
        (changed(("cost", "operations"), -1), "no valid number of operations"),
        (changed(("cost",), lambda old: {**old, "operations": None, "usd": 5}), "cost $5, more than $0.02"),
        (changed(("cost",), lambda old: {**old, "operations": None}), "neither operations nor dollars"),
        (changed(("cost", "usd"), "free"), "has a rent of 'free'"),
        (changed(("cost", "usd"), -3), "has a rent of -3"),
        (changed(("cost", "hours"), float("inf")), "does not name its hardware"),
        (changed(("cost", "hardware"), 5), "does not name its hardware"),
        (changed(("cost", "hardware"), ""), "does not name its hardware"),
        (changed(("cost", "told_by"), "run"), "without the run's weights"),
        (changed(("maker", "commit"), ""), "who made it, and from which code"),
        (changed(("maker",), lambda old: {}), "is not a complete entry"),
    ],
)
def test_what_was_not_made_by_the_rules_is_refused(task, board, capsys, change, reason):
    entry = entry_of(board)
    assert challenge_entry.refusals(entry) == []
    wrong = copy.deepcopy(entry)
    change(wrong)
    assert any(reason in each for each in challenge_entry.refusals(wrong)), challenge_entry.refusals(wrong)
    board.write_text(json.dumps({"format": challenge.BOARD_FORMAT, "entries": [wrong]}))
    assert challenge.main(["board", str(board)]) == 1
    assert reason in capsys.readouterr().err


def test_an_entry_over_the_budget_does_not_get_onto_the_board(answers, board, capsys):
    over = ["--operations", "1e14", *STATED[2:]]
    assert enter(answers, board, name="dear", stated=over) == 2
    assert "more than 3.5e+13" in capsys.readouterr().err
    assert len(json.loads(board.read_text())["entries"]) == 1


def test_names_and_images_of_an_earlier_entry_are_refused(answers, board, capsys):
    assert enter(answers, board, name="cheaper") == 2
    assert "cheaper: is rejected: has the images of 'right'" in capsys.readouterr().err
    entry = entry_of(board)
    again = [entry, {**entry, "name": "copied"}, {**entry, "images_sha256": "0"}]
    board.write_text(json.dumps({"format": challenge.BOARD_FORMAT, "entries": again}))
    assert challenge.main(["board", str(board)]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "rejected: 'copied': has the images of 'right'",
        "rejected: 'right': has the name of an earlier entry",
    ]


def test_images_are_graded_again_and_others_are_told(task, answers, board, capsys):
    assert challenge.main(["board", str(board), "--images", str(answers), "--name", "right"]) == 0
    image = np.array(Image.open(answers / "0003.png"))
    image[0, 0] ^= 1
    Image.fromarray(image).save(answers / "0003.png")
    assert challenge.main(["board", str(board), "--images", str(answers), "--name", "right"]) == 2
    assert "was made from other images" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a[/]b", "[red]x", "a\x1b[2Jb"])
def test_names_of_others_are_shown_as_text(board, capsys, name):
    entry = {**entry_of(board), "name": name}
    board.write_text(json.dumps({"format": challenge.BOARD_FORMAT, "entries": [entry]}))
    capsys.readouterr()
    assert challenge.main(["board", str(board)]) == 0
    shown = capsys.readouterr().out
    assert name.replace("\x1b", "\\x1b") in shown
    assert "\x1b" not in shown


def test_images_of_a_name_on_two_tasks_are_graded_by_the_task(task, answers, board, capsys):
    first = entry_of(board)
    broken = {"name": "right", "task": "medium"}
    board.write_text(json.dumps({"format": challenge.BOARD_FORMAT, "entries": [first, broken]}))
    again = ["board", str(board), "--images", str(answers), "--name", "right"]
    assert challenge.main(again) == 2
    assert "--task: small, medium" in capsys.readouterr().err
    assert challenge.main([*again, "--task", "medium"]) == 2
    assert "is not a complete entry" in capsys.readouterr().err
    assert challenge.main([*again, "--task", "small"]) == 1  # the other entry is refused
    assert "right" in capsys.readouterr().out


def test_missing_doubled_and_other_sized_images_are_named(task, answers):
    shutil.copy(answers / "0002.png", answers / "0002-again.png")
    with pytest.raises(UserError, match="same number"):
        challenge_entry.numbered_images(answers, task)
    (answers / "0002-again.png").unlink()
    (answers / "sheet-0000.png").write_bytes(b"")  # what hdm-sample lays beside its images
    paths = challenge_entry.numbered_images(answers, task)
    Image.new("RGB", (32, 32)).save(paths[5])
    with pytest.raises(UserError, match="is 32x32 px, expected 64x64"):
        challenge_entry.read_images(paths, task)
    paths[5].unlink()
    with pytest.raises(UserError, match="23 numbered images of 24; 0005 is missing"):
        challenge_entry.numbered_images(answers, task)
    with pytest.raises(UserError, match="is not a folder"):
        challenge_entry.numbered_images(answers / "0001.png", task)


def test_the_training_set_is_the_same_everywhere_and_another_is_refused(task, tmp_path, capsys):
    assert challenge.main(["data", "small", "--out", str(tmp_path / "one")]) == 0
    task.build(tmp_path / "two")
    shard = "shapes-00000.tar"
    assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()
    task.require_data(tmp_path / "one")
    build_shapes(tmp_path / "other", count=SCENES, seed=7)
    with pytest.raises(UserError, match="is not the training set"):
        task.require_data(tmp_path / "other")
    with pytest.raises(UserError, match="is not the training set"):
        task.require_data(tmp_path / "nothing")
    dataclasses.replace(task, scenes=SCENES + 1).build(tmp_path / "more")
    with pytest.raises(UserError, match="exactly the shards of"):
        task.require_data(tmp_path / "more")
    with_other_image(tmp_path / "two" / shard)
    with pytest.raises(UserError, match="scene 2 is not the task's"):
        task.require_data(tmp_path / "two")


def with_other_image(shard):
    """Put the image of scene 0 into the place of scene 2's."""
    members = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            members[member.name] = archive.extractfile(member).read()
    members["00000002.png"] = members["00000000.png"]
    folder = shard.parent / "unpacked"
    folder.mkdir()
    with tarfile.open(shard, "w") as archive:
        for name, content in members.items():
            (folder / name).write_bytes(content)
            archive.add(folder / name, name)


def test_a_run_is_counted_from_its_folder_and_draws_its_own_images(task, toy_job, tmp_path, capsys):
    shards, run, drawn = tmp_path / "shards", tmp_path / "run", tmp_path / "drawn"
    task.build(shards)
    config = toy_job(run, px16={}, px32={"resolution": 32, "routing_rate": 0.0, "samples": 16})
    config["data"]["train"] = str(shards)
    assert run_job(check_job(config)) == 0
    counted = count_run(run, task)
    network = XUTConfig.from_json(config["model"])
    factor = counted_factor(run)
    expected = 48 * training_flops(network, (16 // factor,) * 2, 8, 0.5) + 16 * training_flops(
        network, (32 // factor,) * 2, 8, 0.0
    )
    assert counted.cost.operations == expected
    assert counted.cost.hours > 0
    assert counted.pretrained == (config["text_encoder"]["name"], config["vae"]["name"])
    prompts = tmp_path / "prompts.txt"
    assert challenge.main(["prompts", "small", "--out", str(prompts)]) == 0
    words = [str(run), "--prompts", str(prompts), "--seed", "0", "--steps", "1", "--size", "64x64", "--out", str(drawn)]
    assert sample.main(words) == 0
    board = tmp_path / "board.json"
    ours = ["--run", str(run), "--by", "me", "--commit", "abc"]
    assert enter(drawn, board, name="toy", stated=ours) == 0
    entry = entry_of(board)
    assert entry["cost"]["told_by"] == "run"
    assert set(entry["maker"]["weights"]) == {"ema", "raw"}
    capsys.readouterr()
    paths = challenge_entry.numbered_images(drawn, task)
    other = dataclasses.replace(counted, weights={"ema": "0" * 64})
    with pytest.raises(UserError, match="other weights"):
        challenge_entry.require_by_the_rules(paths, task, other)
    with pytest.raises(UserError, match="other prompt"):
        challenge_entry.require_by_the_rules(paths[::-1], task, counted)
    (run / "environment.json").write_text("{}")
    assert enter(drawn, board, name="from a wheel", stated=["--run", str(run), "--by", "me"]) == 2
    assert "--commit: is required" in capsys.readouterr().err
    assert enter(drawn, board, name="twice told", stated=[*ours, "--operations", "1"]) == 2
    assert "is counted from the run" in capsys.readouterr().err
    assert enter(drawn, board, name="twice told", stated=[*ours, "--pretrained", "x"]) == 2
    assert "--pretrained: is counted from the run" in capsys.readouterr().err


def test_what_was_trained_elsewhere_does_not_count_as_trained_on_the_task(task, toy_job, tiny_autoencoder, tmp_path):
    shards, run, autoencoder = tmp_path / "shards", tmp_path / "run", tmp_path / "autoencoder"
    task.build(shards)
    config = toy_job(run, px16={}, px32={"resolution": 32, "samples": 16})
    config["data"]["train"] = str(shards)
    assert run_job(check_job(config)) == 0
    recorded = run / "config.yaml"
    settings = OmegaConf.load(recorded)
    OmegaConf.update(settings, "schedule.stages.px32.data", {"train": str(tmp_path / "others")})
    OmegaConf.save(settings, recorded)
    with pytest.raises(UserError, match=r"data\.train: is more than one folder"):
        count_run(run, task)
    OmegaConf.update(settings, "schedule.stages.px32.data", {"train": str(shards)})
    shutil.copytree(tiny_autoencoder, autoencoder / "final")
    OmegaConf.update(settings, "vae.name", str(autoencoder))
    OmegaConf.save(settings, recorded)
    of_autoencoder = {
        "autoencoder": {"source": "stabilityai/sd-vae-ft-mse"},
        "data": {"train": str(shards)},
        "stage": {"samples": 16, "resolution": 64},
        "loss": {"perceptual_network": "efficientnet_lite0", "perceptual_weight": 1.0},
    }
    OmegaConf.save(of_autoencoder, autoencoder / "config.yaml")
    with pytest.raises(UserError, match="autoencoder: did not start from random weights"):
        count_run(run, task)
    OmegaConf.save({**of_autoencoder, "autoencoder": {"source": None}}, autoencoder / "config.yaml")
    assert count_run(run, task).pretrained == (config["text_encoder"]["name"], "efficientnet_lite0")


def test_the_run_of_an_autoencoder_is_found_by_each_of_its_names(tmp_path, tiny_autoencoder, monkeypatch):
    run = tmp_path / "autoencoder"
    shutil.copytree(tiny_autoencoder, run / "final")
    assert autoencoder_run(str(run / "final")) is None
    (run / "config.yaml").write_text("stage: {}\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(run / "final")
    for name in (run, run / "final", "autoencoder", "autoencoder/final", "link"):
        assert autoencoder_run(str(name)) == run, name
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match="there is no folder"):
        autoencoder_run("autoencoder/final")
    assert autoencoder_run(str(tiny_autoencoder)) is None


def counted_factor(run):
    """Pixels a latent cell of the run's autoencoder."""
    config = json.loads((run / "final" / "vae" / "config.json").read_text())
    return 2 ** (len(config["block_out_channels"]) - 1)


def test_a_cost_is_plain_values():
    cost = Cost(1e12, None, 0.5, "a desk", "entrant")
    assert Cost(**json.loads(json.dumps(dataclasses.asdict(cost)))) == cost
