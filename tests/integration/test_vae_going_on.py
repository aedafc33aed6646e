"""Going on with an autoencoder's training otherwise than it began: what counts, and what is refused."""

import math
import shutil
from pathlib import Path

import pytest

from composed import check_job, end_of, run_job
from crash import crashing_at
from hdm_lightning.errors import UserError


@pytest.fixture
def interrupted(toy_vae_config, changed, monkeypatch):
    """The configuration of a run with a discriminator, killed in its fifth step of six; a checkpoint of step 4."""
    stage = {"weight_decay": 0.1, "warmup_samples": 0, "final_learning_rate_ratio": 0.01}
    adversarial = {"weight": 0.5, "start_samples": 16, "channels": 4, "layers": 1, "learning_rate": 1e-3}
    config = changed(toy_vae_config, stage=stage, adversarial=adversarial)
    with crashing_at(5):
        run_job(check_job(config))
    return config


def averaging(halflives):
    return {"weight_averages": {"halflife_samples": halflives}}


def optimizers(config):
    return end_of(config, "01-vae")["optimizer_states"]


def cosine(progress):
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def test_rates_and_decay_that_were_changed_count_from_the_next_step(interrupted, changed):
    """The rates in a checkpoint are those of the step to come: of step 5 of 6, and of step 3 of the judge's 4."""
    before = optimizers(interrupted)
    assert before[0]["param_groups"][0]["lr"] == pytest.approx(2e-3 * cosine(5 / 6))
    assert before[1]["param_groups"][0]["lr"] == pytest.approx(1e-3 * cosine(3 / 4))
    config = changed(
        interrupted,
        stage={"learning_rate": 1e-2, "weight_decay": 0.0, "betas": [0.8, 0.9]},
        adversarial={"learning_rate": 1e-4, "betas": [0.7, 0.9], "weight": 0.25},
    )
    assert run_job(check_job(config)) == 0
    generator, judge = optimizers(config)
    for state, rate, betas, steps in ((generator, 1e-2, (0.8, 0.9), 6), (judge, 1e-4, (0.7, 0.9), 4)):
        assert {int(moment["step"]) for moment in state["state"].values()} == {steps}  # the moments went on
        for group in state["param_groups"]:
            assert (group["initial_lr"], tuple(group["betas"]), group["weight_decay"]) == (rate, betas, 0.0)
            assert group["lr"] == pytest.approx(0.01 * rate)


@pytest.mark.parametrize(
    ("groups", "where"),
    [
        ({"stage": {"batch_size": 16}}, "stage.batch_size"),
        ({"adversarial": {"weight": 0.0}}, "adversarial.weight"),
        ({"adversarial": {"channels": 8}}, "adversarial.channels"),
        ({"adversarial": {"layers": 2}}, "adversarial.layers"),
        ({"adversarial": {"norm": "none"}}, "adversarial.norm"),
        ({"autoencoder": {"train_encoder": False}}, "autoencoder.train_encoder"),
    ],
)
def test_what_a_run_keeps_is_named_before_anything_is_built(interrupted, changed, groups, where):
    stage = {"resolution": 24, "micro_batch_size": 4}  # free to change, and large enough for two layers
    with pytest.raises(UserError) as caught:
        check_job(changed(changed(interrupted, stage=stage), **groups))
    assert caught.value.where == where and "restore it" in caught.value.hint


def test_an_average_cannot_begin_in_the_midst_and_may_end_or_change_there(interrupted, changed):
    for halflives in ([], [32], [16, 64]):
        check_job(changed(interrupted, callbacks=averaging(halflives)))
    config = Path(interrupted["run_dir"], "config.yaml")
    written = config.read_text()
    assert written.count("    halflife_samples:\n    - 16\n") == 1
    config.write_text(written.replace("    halflife_samples:\n    - 16\n", "    halflife_samples: []\n"))
    with pytest.raises(UserError) as caught:
        check_job(interrupted)
    assert caught.value.where == "callbacks.weight_averages.halflife_samples" and "[], not [16]" in caught.value.what
    config.write_text(written)
    assert run_job(check_job(changed(interrupted, callbacks=averaging([16, 64])))) == 0


def test_another_network_is_refused(interrupted, changed, tiny_autoencoder):
    wider = {**interrupted["autoencoder"]["config"], "block_out_channels": [8, 12]}
    for autoencoder, where in (
        ({"config": wider}, "autoencoder.config"),
        ({"config": None, "source": str(tiny_autoencoder)}, "autoencoder.config"),
    ):
        with pytest.raises(UserError) as caught:
            check_job(changed(interrupted, autoencoder=autoencoder))
        assert caught.value.where == where


def test_a_source_that_has_moved_is_found_again(interrupted, changed, tiny_autoencoder, tmp_path):
    """The same folder by another path is the same; a copy is told where to be written down."""
    linked, copied = tmp_path / "linked", tmp_path / "copied"
    linked.symlink_to(tiny_autoencoder, target_is_directory=True)
    shutil.copytree(tiny_autoencoder, copied)
    source = {"config": None, "source": str(tiny_autoencoder)}
    run = changed(interrupted, run_dir=str(tmp_path / "fine"), autoencoder=source, stage={"samples": 16})
    run["adversarial"] = {"weight": 0.0}
    assert run_job(check_job(run)) == 0
    check_job(changed(run, autoencoder={"source": str(linked)}))
    with pytest.raises(UserError) as caught:
        check_job(changed(run, autoencoder={"source": str(copied)}))
    config = Path(run["run_dir"], "config.yaml")
    assert caught.value.where == "autoencoder.source" and str(config) in caught.value.hint
    config.write_text(config.read_text().replace(str(tiny_autoencoder), str(copied)))
    check_job(changed(run, autoencoder={"source": str(copied)}))


def test_a_training_that_is_over_is_described_as_it_was(toy_vae_config, changed):
    """The same command writes the same hand-over; one with other settings is refused."""
    final = Path(toy_vae_config["run_dir"]) / "final"
    assert run_job(check_job(toy_vae_config)) == 0
    written = {path.name: path.read_bytes() for path in final.iterdir()}
    environment = Path(toy_vae_config["run_dir"]) / "environment.json"
    environment.write_text(environment.read_text().replace('"commit": ', '"commit": "of the training", "other": '))
    machine = changed(toy_vae_config, stage={"micro_batch_size": 4, "save_every": 0})
    assert run_job(check_job(machine)) == 0
    assert (final / "config.json").read_bytes() == written["config.json"]
    assert '"commit": "of the training"' in (final / "measures.json").read_text()
    card = (final / "README.md").read_text()
    assert "images of the training set" in card and f"vae.name={final}" in card
    for where, groups in {
        "stage.samples": {"stage": {"samples": 96}},
        "equivariance.equivariant": {"equivariance": {"equivariant": 0.0}},
        "loss.pixel": {"loss": {"pixel": "l2"}},
        "seed": {"seed": 7},
        "data.lanes": {"data": {"lanes": 2}},
        "patches": {"patches": {"size_px": 8, "samples": 8}},
    }.items():
        with pytest.raises(UserError, match="is over") as caught:
            check_job(changed(toy_vae_config, **groups))
        assert caught.value.where.startswith(where) and "autoencoder.source" in caught.value.hint
