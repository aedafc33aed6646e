"""What the page shows of a run, and what is left of one: numbers against those that the run was written with."""

import json
import os
from itertools import pairwise

import pytest

from hdm_lightning.app.run_history import MOST_POINTS, Curves, Point, Run, remainder
from hdm_lightning.app.shelf import chosen, find_runs, inside, newest
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.operations import training_flops
from shown_run import write_run
from toy_run import MODEL


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_text_encoder, tiny_autoencoder):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "sweep" / "one", tiny_text_encoder, tiny_autoencoder)
    write_run(folder / "begun", tiny_text_encoder, tiny_autoencoder, finished=False)
    return folder


def test_runs_are_found_below_a_folder_and_links_are_not_followed(runs, tmp_path):
    (runs / "elsewhere").symlink_to(tmp_path)
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / "ledger.jsonl").write_text("")
    assert list(find_runs([runs])) == [str(runs / "begun"), str(runs / "sweep" / "one")]
    assert list(find_runs([runs / "begun"])) == [str(runs / "begun")]
    assert find_runs([runs / "nowhere"]) == {}


def test_none_of_many_runs_is_dropped(tmp_path):
    for number in range(2500):
        (tmp_path / str(number) / "final").mkdir(parents=True)
        (tmp_path / str(number) / "config.yaml").touch()
    assert len(find_runs([tmp_path])) == 2500


@pytest.mark.parametrize("name", ["../begun", "/etc/passwd", "", None, 3, ["begun"], "begun/../../x"])
def test_a_name_that_was_not_offered_is_refused(runs, name):
    with pytest.raises(UserError, match="run: "):
        chosen(find_runs([runs]), name, "run")


def test_the_newest_run_is_the_one_whose_files_were_written_last(runs):
    found = find_runs([runs])
    for name, time in ((str(runs / "begun"), 2e9), (str(runs / "sweep" / "one"), 3e9), (str(runs / "begun"), 4e9)):
        os.utime(found[name] / "ledger.jsonl", (time, time))
        assert newest(found) == name


def test_a_link_out_of_a_run_is_not_read(runs, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    (runs / "begun" / "link").symlink_to(secret)
    with pytest.raises(UserError, match="leads out of"):
        inside(runs / "begun", runs / "begun" / "link")
    assert inside(runs / "begun", runs / "begun" / "ledger.jsonl").name == "ledger.jsonl"


def test_files_of_a_run_that_are_links_out_of_it_are_not_shown(tmp_path, tiny_text_encoder, tiny_autoencoder):
    run = write_run(tmp_path / "run", tiny_text_encoder, tiny_autoencoder, finished=False)
    sample = next((run / "02-px32" / "samples").glob("*.png"))
    sample.rename(tmp_path / "outside.png")
    sample.symlink_to(tmp_path / "outside.png")
    assert [text for _, text in Run(run).samples()] == ["32 samples, 16x16 px"]
    events = next((run / "02-px32" / "tensorboard").iterdir())
    events.rename(tmp_path / events.name)
    events.symlink_to(tmp_path / events.name)
    assert [point.samples for point in Run(run).curves().points["train/loss_mean"]] == [*range(0, 33, 8)]
    (run / "ledger.jsonl").rename(tmp_path / "ledger.jsonl")
    (run / "ledger.jsonl").symlink_to(tmp_path / "ledger.jsonl")
    with pytest.raises(UserError, match="leads out of"):
        Run(run)


def test_stages_say_how_far_they_are_and_what_they_cost(runs):
    first, second = Run(runs / "begun").stages()
    assert (first.samples, first.plan.samples, first.state, first.validation) == (96, 96, "ended", {"raw": 0.5})
    assert (second.samples, second.plan.samples, second.state) == (32, 64, "started")
    assert (first.seconds, second.seconds, first.cost_usd, second.device_hours) == (48.0, 64.0, 0.5, 0.03)


def test_what_is_left_goes_by_the_pace_of_the_stage_at_work(runs):
    left = remainder(Run(runs / "begun"))
    assert (left.samples, left.seconds, left.stage_seconds) == (32, 64.0, 64.0)
    assert left.cost_usd == pytest.approx(1.0)
    assert (left.spent_seconds, left.spent_usd) == (112.0, 1.5)
    assert "64 s left" in left.text()
    assert remainder(Run(runs / "sweep" / "one")).samples == 0


def test_a_later_stage_counts_by_its_operations(tmp_path, tiny_text_encoder, tiny_autoencoder):
    run = write_run(tmp_path / "run", tiny_text_encoder, tiny_autoencoder, finished=False)
    lines = (run / "ledger.jsonl").read_text().splitlines()
    halfway = json.dumps({**json.loads(lines[1]), "event": "progress", "samples": 48})
    (run / "ledger.jsonl").write_text(f"{lines[0]}\n{halfway}\n")
    (run / "01-px16" / "done.json").unlink()
    small, large = (training_flops(XUTConfig(**MODEL), (side // 4, side // 4), 8, 0.0) for side in (16, 32))
    left = remainder(Run(run))
    assert left.stage_seconds == pytest.approx(48.0)
    assert left.seconds == pytest.approx(48.0 + 64 * (48.0 / 48) * large / small)


def test_a_run_without_a_line_has_no_forecast(tmp_path, tiny_text_encoder, tiny_autoencoder):
    run = write_run(tmp_path / "run", tiny_text_encoder, tiny_autoencoder, finished=False)
    (run / "ledger.jsonl").write_text("")
    assert remainder(Run(run)) is None


def test_curves_of_all_stages_stand_on_one_axis(runs):
    curves = Run(runs / "begun").curves()
    assert curves.usual() == ["train/loss_mean", "val/loss"]
    assert [point.samples for point in curves.points["train/loss_mean"]] == [*range(0, 33, 8), *range(96, 129, 8)]
    assert curves.points["train/loss_mean"][1].value == pytest.approx(2 / 9)
    assert [(point.samples, point.value) for point in curves.of(["val/loss", "none"])] == [(32, 0.25), (128, 0.125)]


def test_long_curves_keep_their_shape_and_their_end():
    points = [Point("a", number, float(number)) for number in range(10 * MOST_POINTS + 1)]
    kept = Curves({"a": points}).of(["a"])
    assert len(kept) <= MOST_POINTS and kept[-1] == points[-1]
    assert len({after.samples - before.samples for before, after in pairwise(kept)}) == 1


def test_samples_come_in_the_order_of_time(runs):
    shown = Run(runs / "begun").samples()
    assert [text for _, text in shown] == ["32 samples, 16x16 px", "128 samples, 16x16 px"]
    assert [image.getpixel((0, 0)) for image, _ in shown] == [(60, 0, 0), (120, 0, 0)]
