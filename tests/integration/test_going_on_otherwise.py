"""Going on with settings other than those that a run began with: what counts, and what is refused."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from composed import check_job, composed, end_of, run_job, saved_in
from crash import crashing_at
from hdm_lightning.errors import UserError
from hdm_lightning.training import job
from hdm_lightning.training.continued import OF_THE_TRAINING, without_effect
from hdm_lightning.training.recorded import recorded_text


@pytest.fixture
def interrupted(toy_job, tmp_path, monkeypatch):
    """The configuration of a run that was killed in its fifth step, with a checkpoint of its fourth."""
    config = toy_job(tmp_path / "run", px16={"warmup_samples": 0, "weight_decay": 0.1})
    with crashing_at(5):
        run_job(check_job(config))
    return config


def groups(config):
    """Settings of each parameter's group in the newest checkpoint, by the parameter's name."""
    saved = end_of(config)["optimizer_states"][0]
    found = {}
    for group in saved["param_groups"]:
        for name, number in zip(group["names"], group["params"], strict=True):
            found[name] = {**group, "moments": saved["state"][number]["step"].item()}
    return found


def test_a_rate_and_a_decay_that_were_changed_count_from_the_next_step(interrupted):
    """The last rate is that of step 6 of 6 plus one, where the cosine has ended at a hundredth."""
    before = groups(interrupted)
    stage = interrupted["schedule"]["stages"]["px16"]
    stage["learning_rate"], stage["weight_decay"], stage["betas"] = 0.05, 0.0, [0.8, 0.9]
    assert run_job(check_job(interrupted)) == 0
    after = groups(interrupted)
    assert before.keys() == after.keys()
    decayed = [name for name, group in before.items() if group["weight_decay"] == 0.1]
    assert decayed and all(group["weight_decay"] == 0 for group in after.values())
    for name, group in before.items():
        assert after[name]["initial_lr"] == pytest.approx(group["initial_lr"] * 0.05 / 0.2)
        assert after[name]["lr"] == pytest.approx(0.01 * after[name]["initial_lr"])
        assert tuple(after[name]["betas"]) == (0.8, 0.9)
        assert (group["moments"], after[name]["moments"]) == (4, 6)  # the moments went on
        fourth = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 5 * 8 / 48))
        assert group["lr"] == pytest.approx(fourth * group["initial_lr"])


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"schedule.stages.px16": {"batch_size": 16}}, "schedule.stages.px16.batch_size"),
        ({"model": {"mlp_width": 64}}, "model.mlp_width"),
        ({"model": {"residual": "normed"}}, "model.residual"),
        ({"optimizer": {"_target_": "hdm_lightning.training.optimization.muon.MuonAdamW"}}, "optimizer._target_"),
        ({"text_encoder": {"layer": -2}}, "text_encoder.layer"),
        ({"text_encoder": {"whiten_captions": 8}}, "text_encoder.whiten_captions"),
        ({"vae": {"mean": [0.0, 0.1, 0.0, 0.0]}}, "vae.mean"),
        ({"vae": {"std": [0.5, 0.5, 0.5, 1.0]}}, "vae.std"),
    ],
)
def test_what_a_run_keeps_is_named_before_anything_is_built(interrupted, change, where):
    for path, values in change.items():
        place = interrupted
        for key in path.split("."):
            place = place.setdefault(key, {})
        place.update(values)
    with pytest.raises(UserError) as caught:
        check_job(interrupted)
    assert caught.value.where == where and caught.value.hint


def test_a_run_of_an_earlier_version_goes_on_with_other_limits_of_its_encoders(interrupted):
    """Its config.yaml has keys that are gone; how much the encoders take at once is free to change."""
    file = Path(interrupted["run_dir"], "config.yaml")
    config = OmegaConf.load(file)
    for group, limit in (("text_encoder", "max_tokens"), ("vae", "max_pixels")):
        config[group].pop(limit)
        config[group].max_batch = 32
        interrupted[group][limit] = 1
    OmegaConf.save(config, file)
    assert run_job(check_job(interrupted)) == 0


@pytest.mark.parametrize("encoder", ["text_encoder", "vae"])
def test_another_encoder_is_refused_and_the_same_by_another_path_is_not(interrupted, tmp_path, encoder):
    first = Path(interrupted[encoder]["name"])
    copied, linked = tmp_path / "copied", tmp_path / "linked"
    shutil.copytree(first, copied)
    linked.symlink_to(first, target_is_directory=True)
    interrupted[encoder]["name"] = str(linked)
    check_job(interrupted)
    interrupted[encoder]["name"] = str(copied)
    with pytest.raises(UserError) as caught:
        check_job(interrupted)
    assert caught.value.where == f"{encoder}.name"
    assert str(first) in caught.value.what and str(copied) in caught.value.what
    config = Path(interrupted["run_dir"], "config.yaml")
    assert str(config) in caught.value.hint  # which is to be told where it is now
    config.write_text(config.read_text().replace(str(first), str(copied)))
    assert run_job(check_job(interrupted)) == 0


def test_what_may_change_is_not_refused(interrupted):
    """Also where an earlier version wrote the configuration, without the keys of today and with others."""
    config = Path(interrupted["run_dir"], "config.yaml")
    written = config.read_text()
    for line in ("  layer: -1\n", "  whiten_captions: 0\n", "  mean: null\n", "  std: null\n"):
        assert written.count(line) == 1
        written = written.replace(line, "  max_batch: 3\n" if "layer" in line else "")
    config.write_text(written)
    interrupted["text_encoder"] |= {"dtype": "float32", "cache_size": 4}
    interrupted["vae"] |= {"dtype": "float32", "cache_size": 4}
    interrupted["data"] |= {"captions": {"drop": 0.5}, "crop": {"flip": True}}
    interrupted["validation"] |= {"seed": 3, "samples": 4}
    interrupted["schedule"]["stages"]["px16"] |= {"context_length": 6, "micro_batch_size": 2}
    assert run_job(check_job(interrupted)) == 0


def test_a_run_on_white_states_keeps_them(toy_job, tmp_path):
    config = toy_job(tmp_path / "run", px16={"samples": 8})
    config["text_encoder"]["whiten_captions"] = 8
    assert run_job(check_job(config)) == 0
    config["text_encoder"]["whiten_captions"] = 16
    check_job(config)  # they are measured already
    config["text_encoder"]["whiten_captions"] = 0
    with pytest.raises(UserError) as caught:
        check_job(config)
    assert caught.value.where == "text_encoder.whiten_captions" and "8, not 0" in caught.value.what


def test_a_stage_that_is_done_may_be_told_another_batch_size_while_another_is_to_come(interrupted, capfd):
    """It is said that this changes nothing, once: of what bears on the weights, and not of how often is saved."""
    assert run_job(check_job(interrupted)) == 0
    stages = interrupted["schedule"]["stages"]
    stages["px24"] = {**stages["px16"], "resolution": 24}
    stages["px16"] |= {"batch_size": 16, "save_every": 1 + stages["px16"]["save_every"]}
    capfd.readouterr()
    assert run_job(check_job(interrupted)) == 0
    warnings = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: schedule.")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: schedule.stages.px16.batch_size was 8 ")
    assert saved_in(Path(interrupted["run_dir"]), "02-px24")


def test_a_finished_run_says_so_and_refuses_what_would_change_nothing(toy_job, tiny_shards, tmp_path, capsys):
    def changed(run="run", **changes):
        config = toy_job(tmp_path / run, px16={"samples": 16, **changes.pop("stage", {})})
        return {**config, **{key: {**config.get(key, {}), **value} for key, value in changes.items()}}

    assert run_job(check_job(changed())) == 0
    assert "is finished" not in capsys.readouterr().out
    final = tmp_path / "run" / "final"
    weights = (final / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    more = {"data": {"num_workers": 1}, "stage": {"save_every": 8}, "callbacks": {"sample_images": {"steps": 3}}}
    assert run_job(check_job(changed(**more))) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path / 'run'} is finished: there is nothing to train" in told and f"init={tmp_path / 'run'}" in told
    assert (final / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert json.loads((final / "model_index.json").read_text())["sampling"]["steps"] == 3
    copied = tmp_path / "other shards"
    shutil.copytree(tiny_shards, copied)
    for where, changes in {
        "schedule.stages.px16.samples": {"stage": {"samples": 32}},
        "schedule.stages.px16.batch_size": {"stage": {"batch_size": 16}},
        "data.train": {"data": {"train": str(copied)}},
    }.items():
        with pytest.raises(UserError, match="is over and used") as caught:
            check_job(changed(**changes))
        assert caught.value.where == where and f"init={tmp_path / 'run'}" in caught.value.hint
    new = {**changed("new", stage={"samples": 24}), "init": str(tmp_path / "run")}  # what the message says to type
    assert run_job(check_job(new)) == 0


ADDED = {
    "data.captions.kinds": {"txt": 0.3},
    "data.captions.tags": {"tag_drop": 0.5},
    "data.crop.buckets": {"step_px": 8},
    "schedule.stages.px16.data": {"captions": {"drop": 0.5}},
    "schedule.stages.px16": {"betas": [0.8, 0.9]},
    "optimizer": {"amsgrad": True},
    "module": {"learning_rate": 0.3},  # follows from the stage otherwise, and is in no record
    "lr_scheduler": {"final_ratio": 0.5},
    "callbacks.weight_averages": {"halflife_samples": [16, 64, 256]},
}
"""By group, a key that the finished run of the test below did not have, or a value."""


def test_keys_added_to_a_finished_run_are_refused_as_changed_ones_are(toy_job, tmp_path):
    config = toy_job(tmp_path / "run", px16={"samples": 8})
    config["data"]["captions"] = {"kinds": {"long": 0.7}, "tags": {"kept": "|||"}}
    assert run_job(check_job(config)) == 0
    check_job(config)
    for path, values in {**ADDED, "data.captions.kinds ": {"long": 0.8}}.items():
        changed = copy.deepcopy(config)
        place = changed
        for key in path.strip().split("."):
            place[key] = place.get(key) or {}
            place = place[key]
        place.update(values)
        with pytest.raises(UserError, match="is over and used") as caught:
            check_job(changed)
        assert caught.value.where.startswith(path.strip())


@pytest.mark.parametrize("callbacks", [{}, {"weight_averages": None}])
def test_a_finished_run_without_averages_is_started_again(toy_job, tmp_path, capfd, callbacks):
    """What it lacked and is asked for now is named: it has no effect any more. Of the same command nothing is said."""
    config = composed(toy_job(tmp_path / "run", px16={"samples": 8}))
    shipped, config.callbacks = config.callbacks, callbacks
    assert run_job(job.check_job(config.copy())) == 0
    assert run_job(job.check_job(config.copy())) == 0
    assert "no effect any more" not in capfd.readouterr().out
    config.callbacks = {**shipped, "weight_averages": None}
    config.trainer.log_every_n_steps, config.guard.spike_factor = 7, 9.0
    assert run_job(job.check_job(config.copy())) == 0
    (line,) = [each for each in capfd.readouterr().out.splitlines() if "no effect any more" in each]
    named = line.partition("any more: ")[2].split(", ")
    assert {"callbacks.sample_images", "trainer.log_every_n_steps", "guard.spike_factor"} <= set(named)
    assert {each.partition(".")[0] for each in named} == {"callbacks", "trainer", "guard"}
    config.callbacks = {"weight_averages": {"halflife_samples": [16]}}
    with pytest.raises(UserError, match="is over and used"):
        job.check_job(config)


def plans_of(config):
    return job.recipe_of(config).plans(config, 1)


def test_of_a_finished_run_whose_folder_was_moved_no_key_is_named(toy_job, tmp_path):
    """Paths in its record begin with the folder of then, and loggers have its name."""
    config = composed({**toy_job(tmp_path / "run", px16={"samples": 8}), "name": "before"})
    config.logger.board = {"id": "${name}", "save_dir": "${run_dir}", "uri": "file:${run_dir}/x"}
    (tmp_path / "moved").mkdir()
    record = tmp_path / "moved" / "config.yaml"
    record.write_text(recorded_text(config))
    config.run_dir, config.name = str(tmp_path / "moved"), "after"
    assert str(tmp_path / "run") in record.read_text()
    assert without_effect(config, plans_of(config)) == []
    config.callbacks.store_averages.folder = str(tmp_path / "elsewhere")
    assert without_effect(config, plans_of(config)) == ["callbacks.store_averages"]


@pytest.mark.parametrize("odd", ["3", "[1]", "text", "{1: {a: 2}, b: null}", "null"])
def test_a_record_whose_groups_are_odd_is_compared_as_far_as_it_goes(toy_job, tmp_path, odd):
    config = composed(toy_job(tmp_path, px16={"samples": 8}))
    (tmp_path / "config.yaml").write_text("".join(f"{group}: {odd}\n" for group in OF_THE_TRAINING))
    assert all(key.partition(".")[0] in OF_THE_TRAINING for key in without_effect(config, plans_of(config)))


def test_what_a_later_version_has_brought_with_its_own_value_is_not_refused(toy_job, tmp_path):
    config = toy_job(tmp_path / "run", px16={"samples": 8})
    assert run_job(check_job(config)) == 0
    file = Path(config["run_dir"], "config.yaml")
    record = OmegaConf.load(file)
    for path in ("data.crop.flip", "data.captions.kinds", "data.alpha", "optimizer.eps", "model.skips", "module.rule"):
        group, _, key = path.rpartition(".")
        assert key in OmegaConf.select(record, group)
        OmegaConf.select(record, group).pop(key)
    record.pop("lr_scheduler")
    OmegaConf.save(record, file)
    assert run_job(check_job(config)) == 0


def test_a_stage_added_to_a_finished_run_is_trained(toy_job, tmp_path):
    first = {"samples": 16}
    assert run_job(check_job(toy_job(tmp_path / "run", px16=first))) == 0
    assert run_job(check_job(toy_job(tmp_path / "run", px16=first, px24={"samples": 16, "resolution": 24}))) == 0
    assert saved_in(tmp_path / "run", "02-px24")
    with pytest.raises(UserError, match="is over and used") as caught:  # its final/ would be from the first stage
        check_job(toy_job(tmp_path / "run", px16=first))
    assert caught.value.where == "schedule.stages"
