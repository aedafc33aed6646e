"""hdm-evaluate on a run: its own data, checkpoints, flow loss against scipy and against a direct computation."""

import json
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from scipy.special import logit
from scipy.stats import norm

from composed import check_job, run_job, saved_in
from damage import flip_a_bit
from hdm_lightning.cli import evaluate
from hdm_lightning.data.loader import ValidationLoader
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.flow_loss import bin_shares, loss_table, times_in_bin
from hdm_lightning.evaluation.image_sets import middle_crops, real_images
from hdm_lightning.evaluation.subject import find_run, load_subject
from hdm_lightning.generation.loading import LoadOptions
from hdm_lightning.training.checkpoint_io import DamagedCheckpoint
from hdm_lightning.training.modules import draws
from hdm_lightning.training.recorded_data import recorded_validation_stream
from toy_run import run_config

LOSS = ["--parts", "loss", "--loss-samples", "12", "--time-bins", "3", "--resamples", "40", "--samples", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_text_encoder, tiny_autoencoder, tiny_shards):
    """Folder of a finished run of 64 samples in two stages."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    stage = {"samples": 32, "validate_every": 0, "warmup_samples": 0}
    config = run_config(
        folder,
        tiny_text_encoder,
        tiny_autoencoder,
        tiny_shards,
        {"first": stage, "second": {**stage, "learning_rate": 0.1}},
        validation={"samples": 4, "batch_size": 4},
        callbacks={"progress": None, "weight_averages": {"halflife_samples": [16]}, "checkpoint": {"keep": 4}},
    )
    assert run_job(check_job(config)) == 0
    return folder


def losses_of(path, out, *arguments):
    assert evaluate.main([str(path), *LOSS, *arguments, "--out", str(out)]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    measures = {name: parts["loss"]["measures"] for name, parts in result["results"].items()}
    return {name: found["flow_loss"]["value"] for name, found in measures.items()}, result


def test_a_run_its_last_checkpoint_and_its_weights_files_agree(run, tmp_path):
    whole, result = losses_of(run, tmp_path / "run")
    assert set(whole) == {"ema", "raw"}
    assert whole["ema"] != whole["raw"]
    assert (result["subject"]["name"], result["subject"]["samples_seen"]) == ("toy", 64)
    last = saved_in(run, "02-second")[-1]
    checkpoint, result = losses_of(last, tmp_path / "checkpoint")
    assert checkpoint == pytest.approx(whole, rel=1e-5)
    assert result["subject"]["samples_seen"] == 64
    raw, _ = losses_of(run / "final" / "transformer/diffusion_pytorch_model.raw.safetensors", tmp_path / "raw")
    assert raw == {"raw": pytest.approx(whole["raw"], rel=1e-5)}


def test_checkpoints_on_the_way_count_their_samples_and_stand_for_a_run_without_final(run, tmp_path):
    first = saved_in(run, "01-first")[0]
    losses, result = losses_of(first, tmp_path / "first", "--weights", "ema")
    assert result["subject"]["samples_seen"] == 16
    assert set(losses) == {"ema"}
    unfinished = tmp_path / "unfinished"
    (unfinished / "01-first" / "checkpoints").mkdir(parents=True)
    (unfinished / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(UserError, match="neither final/ nor a checkpoint"):
        load_subject(unfinished, LoadOptions())
    (unfinished / "01-first" / "checkpoints" / first.name).write_bytes(first.read_bytes())
    (unfinished / "01-first" / "checkpoints" / "step-99999999 (copy).ckpt").write_bytes(b"cut off")
    assert losses_of(unfinished, tmp_path / "u", "--weights", "ema")[0] == pytest.approx(losses, rel=1e-5)


def test_damaged_checkpoints_are_passed_over_or_refused_and_stay_where_they_are(run, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "final")
    kept = saved_in(unfinished, "02-second")
    flip_a_bit(kept[-1])
    with pytest.raises(DamagedCheckpoint, match="checksum"):
        load_subject(kept[-1], LoadOptions())
    assert load_subject(unfinished, LoadOptions()).facts["model"] == str(kept[-2])
    assert f"{kept[-1]} is damaged" in capsys.readouterr().err
    for path in unfinished.glob("*/checkpoints/*.ckpt"):
        path.write_bytes(path.read_bytes()[:-5000])
    before = sorted(unfinished.rglob("*.ckpt*"))
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        load_subject(unfinished, LoadOptions())
    assert sorted(unfinished.rglob("*.ckpt*")) == before


def other_encoders(text_encoder, autoencoder, folder):
    """Options that name encoders of other weights and another normalisation, in bfloat16."""
    text, vae = shutil.copytree(text_encoder, folder / "text"), shutil.copytree(autoencoder, folder / "vae")
    weights = load_file(text / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, text / "model.safetensors", {"format": "pt"})
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "latents_mean": [1.0] * 4, "latents_std": [0.25] * 4}))
    return LoadOptions(text_encoder=str(text), vae=str(vae), autocast=torch.bfloat16, max_batch=3)


def test_a_checkpoint_takes_the_encoders_that_are_named_as_the_finished_model_does(
    run, tiny_text_encoder, tiny_autoencoder, tmp_path
):
    options = other_encoders(tiny_text_encoder, tiny_autoencoder, tmp_path)
    checkpoint = saved_in(run, "02-second")[-1]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    found = {}
    for path in (checkpoint, run / "final"):
        pipeline = load_subject(path, options).pipeline("ema")
        text = pipeline.encoder.encode(torch.tensor([[2, 3, 4]]), torch.tensor([3]))
        assert (pipeline.encoder.dtype, pipeline.autoencoder.dtype) == (torch.bfloat16, torch.float32)
        assert (pipeline.max_batch, pipeline.autocast) == (3, torch.bfloat16)
        found[path] = (text, pipeline.autoencoder.encode(images))
    torch.testing.assert_close(found[checkpoint], found[run / "final"])
    own = load_subject(checkpoint, LoadOptions()).encoders.autoencoder
    other = load_subject(checkpoint, options).encoders.autoencoder
    torch.testing.assert_close(4.0 * (0.5 * own.encode(images) - 1.0), other.encode(images))


def test_the_normalisation_that_a_run_sets_is_that_of_its_own_autoencoder_alone(
    run, tiny_text_encoder, tiny_autoencoder, tmp_path
):
    options = other_encoders(tiny_text_encoder, tiny_autoencoder, tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("final"))
    config = OmegaConf.load(moved / "config.yaml")
    config.vae.mean, config.vae.std = [2.0] * 4, [8.0] * 4
    OmegaConf.save(config, moved / "config.yaml")
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    raw = 0.5 * load_autoencoder(str(tiny_autoencoder)).encode(images)
    for given, mean, std in ((LoadOptions(), 2.0, 8.0), (options, 1.0, 0.25)):
        encoded = load_subject(moved, given).encoders.autoencoder.encode(images)
        torch.testing.assert_close(std * encoded + mean, raw, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_another_network_is_told_by_its_file(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("final"))
    config = OmegaConf.load(moved / "config.yaml")
    config.model.mlp_width = 64
    OmegaConf.save(config, moved / "config.yaml")
    newest = saved_in(moved, "02-second")[-1]
    with pytest.raises(UserError, match="mis-shaped") as caught:
        load_subject(moved, LoadOptions())
    assert caught.value.where == str(newest)


def test_a_run_whose_training_set_is_not_here_is_measured_without_it(run, tiny_shards, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_shards), "/nowhere/at/all"))
    whole, _ = losses_of(run, tmp_path / "o", "--data", str(tiny_shards), "--weights", "raw")
    there, _ = losses_of(moved, tmp_path / "m", "--data", str(tiny_shards), "--weights", "raw")
    assert there == pytest.approx(whole, rel=1e-5)
    named = ["--data", str(tiny_shards), "--train-data", "/nowhere/at/all"]
    assert evaluate.main([str(moved), *LOSS, *named, "--out", str(tmp_path / "n")]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err


def test_a_checkpoint_away_from_its_run_is_told(run, tmp_path):
    lost = tmp_path / "step-00000004.ckpt"
    lost.write_bytes(saved_in(run, "02-second")[-1].read_bytes())
    with pytest.raises(UserError, match="is not inside a run's folder"):
        load_subject(lost, LoadOptions())


@pytest.mark.parametrize("foreign", ["model: {target: ldm.models.Diffusion}\n", "[1, 2]\n", "{{ not yaml", "a: ${b}\n"])
def test_a_configuration_of_something_else_above_a_model_is_passed_by(run, tmp_path, foreign):
    (tmp_path / "config.yaml").write_text(foreign)
    assert find_run(tmp_path / "models" / "final") is None
    inside = tmp_path / "inner" / "final"
    inside.mkdir(parents=True)
    (tmp_path / "inner" / "config.yaml").write_text((run / "config.yaml").read_text())
    record = find_run(inside)
    assert record is not None and record.settings.name == "toy"
    (tmp_path / "inner" / "config.yaml").write_text((run / "config.yaml").read_text() + "unknown_key: 3\n")
    with pytest.raises(UserError, match="is not a valid hdm-train configuration: unknown_key"):
        find_run(inside)


def test_an_autoencoder_is_sent_to_its_own_command(tiny_autoencoder):
    with pytest.raises(UserError, match="is an autoencoder") as caught:
        load_subject(tiny_autoencoder, LoadOptions())
    assert caught.value.hint.startswith(f"run `hdm-evaluate vae {tiny_autoencoder} ")


def test_reference_pictures_come_from_the_runs_validation_in_its_order(run):
    record = find_run(run / "final")
    assert record is not None
    stream = middle_crops(recorded_validation_stream(record.settings, record.plan, None))
    plan = Plan(stream)
    pictures = list(real_images(stream, plan, 12))
    keys = [key for batch in pictures for key in batch.keys]
    loader = ValidationLoader(stream, plan, lambda _: ([0], 1), samples=12, batch_size=4)
    expected = [(key, image) for batch in loader for key, image in zip(batch["keys"], batch["image"], strict=True)]
    assert [key.split("/")[-2:] for key in keys] == [key.split("/") for key, _ in expected]
    assert torch.equal(torch.cat([batch.images for batch in pictures]), torch.stack([image for _, image in expected]))


def test_bins_hold_the_training_times_they_should():
    edges = np.linspace(0, 1, 7)
    cumulative = norm.cdf(logit(edges))
    np.testing.assert_allclose(bin_shares(6).numpy(), np.diff(cumulative), atol=1e-12)
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number in range(6):
        times = times_in_bin(uniform, number, 6).numpy()
        assert times.min() >= edges[number]
        assert times.max() <= edges[number + 1]
        spread = cumulative[number] + uniform.numpy() * (cumulative[number + 1] - cumulative[number])
        np.testing.assert_allclose(norm.cdf(logit(times)), spread, atol=1e-9)


def test_the_loss_of_a_network_that_says_nothing_is_the_size_of_its_target(run):
    subject = load_subject(run, LoadOptions(max_batch=5))
    pipeline = subject.pipeline("ema")
    with torch.no_grad():
        for parameter in pipeline.network.output_projection.parameters():
            parameter.zero_()
    assert subject.run is not None
    stream = middle_crops(recorded_validation_stream(subject.run.settings, subject.run.plan, None))
    plan = Plan(stream)
    loader = ValidationLoader(stream, plan, pipeline.caption_tokenizer, samples=7, batch_size=5)
    table = torch.cat(list(loss_table(pipeline, loader, seed=3, bins=2)))
    images = torch.cat([batch.images for batch in real_images(stream, plan, 7)]).float() / 127.5 - 1
    latents = pipeline.autoencoder.encode(images)
    for number in range(2):
        drawn = draws.draw(3, f"evaluation/{number}", torch.arange(7), (4, 4, 4), 0)
        expected = (drawn.noise - latents).square().flatten(1).mean(1)
        torch.testing.assert_close(table[:, number], expected.double(), rtol=1e-4, atol=1e-5)


def test_a_run_of_an_earlier_version_is_read_without_its_retired_keys(run, tmp_path):
    config = OmegaConf.load(run / "config.yaml")
    config.text_encoder.max_batch, config.vae.max_batch = 256, 32
    OmegaConf.save(config, tmp_path / "config.yaml")
    assert find_run(tmp_path).settings == find_run(run).settings
    config.vae.max_images = 32
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(UserError, match="unknown key 'max_images'"):
        find_run(tmp_path)
