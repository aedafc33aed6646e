"""Trainings on latents from disk: alone, mixed with images, resumed on other ranks, and against the same online."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from composed import BASES, check_job, done_of, run_job, weights_of
from crash import crashing_at
from hdm_lightning import XUT, FlowModule, ShardDataModule, load_autoencoder, load_text_encoder
from hdm_lightning.cli import overrides
from hdm_lightning.cli.shards import main
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from hdm_lightning.training.modules.flow_step import FrozenEncoders
from shard_writer import ShardWriter


@pytest.fixture(scope="module")
def latents(tiny_shards, tiny_autoencoder, tmp_path_factory):
    """Sets of 16 and 24 px of the tiny shards."""
    out = tmp_path_factory.mktemp("latents")
    assert encode(tiny_shards, out, tiny_autoencoder, 16, 24) == 0
    return out


def encode(shards, out, vae, *resolutions):
    sizes = [str(each) for each in resolutions]
    words = ["--out", str(out), "--vae", str(vae), "--devices", "cpu", "--resolution", *sizes]
    return main(["encode", str(shards), *words])


@pytest.fixture
def cached_job(toy_job, latents):
    """As `toy_job`, on latents."""

    def configuration(folder, **stages):
        config = toy_job(folder, **stages)
        config["data"] = {**config["data"], "train": str(latents)}
        return config

    return configuration


def recorded_encodings(monkeypatch):
    """Shapes of what the autoencoder is asked to encode in training and validation."""
    shapes, original = [], FrozenEncoders.latents

    def latents(self, image):
        shapes.append(tuple(image.shape[-2:]))
        return original(self, image)

    monkeypatch.setattr(FrozenEncoders, "latents", latents)
    return shapes


def test_one_stage_on_latents_and_one_on_images(cached_job, tiny_shards, tmp_path, monkeypatch):
    """The first never asks the autoencoder to encode; sample images and `final/` are those of any run."""
    online = {"resolution": 24, "data": {"train": str(tiny_shards)}}
    config = cached_job(tmp_path / "run", px16={}, px24=online)
    config["callbacks"]["sample_images"] = {"prompts": ["red circle"], "steps": 2}
    shapes = recorded_encodings(monkeypatch)
    assert run_job(check_job(config)) == 0
    assert set(shapes) == {(24, 24)}
    for stage in ("01-px16", "02-px24"):
        assert all(np.isfinite(value) for value in done_of(config, stage)["validation"].values())
        assert list((tmp_path / "run" / stage / "samples").glob("*.png"))
    assert (tmp_path / "run" / "final" / "model_index.json").exists()


def test_resolution_picks_the_set_of_each_stage(cached_job, tmp_path, monkeypatch):
    shapes = recorded_encodings(monkeypatch)
    assert run_job(check_job(cached_job(tmp_path / "run"))) == 0
    assert not shapes
    with pytest.raises(UserError) as caught:
        check_job(cached_job(tmp_path / "other", px16={}, px32={"resolution": 32}))
    assert "32 px, only at 16 px, 24 px" in str(caught.value) and "--resolution 32" in caught.value.hint


def test_a_stage_says_what_it_is_to_read(cached_job, tiny_shards, tmp_path):
    """Images where latents are asked for would be encoded at every sight; both ways are refused before a run."""
    images = {"data": {"train": str(tiny_shards)}}
    assert check_job(cached_job(tmp_path / "run", px16={"latents": True}, px24={"latents": False, **images})).plans
    for wrong, hint in (({"latents": True, **images}, "hdm-shards encode"), ({"latents": False}, "data.train=IMAGES")):
        with pytest.raises(UserError) as caught:
            check_job(cached_job(tmp_path / "other", px16=wrong))
        assert caught.value.where == "schedule.stages.px16.latents" and hint in caught.value.hint
    (advised,) = [word for word in caught.value.hint.replace(";", "").split() if "IMAGES" in word]
    for present in ([], ["+schedule.stages.px16.data.train=latents"]):
        config = overrides.composed("train", [*BASES["train"], *present, advised])
        assert config.schedule.stages.px16.data.train == "IMAGES"


def test_killed_and_resumed_equals_uninterrupted(cached_job, tmp_path, monkeypatch):
    whole, killed = (cached_job(tmp_path / name, px16={}) for name in ("whole", "killed"))
    assert run_job(check_job(whole)) == 0
    with crashing_at(5):
        run_job(check_job(killed))
    assert run_job(check_job(killed)) == 0
    expected, got = weights_of(whole), weights_of(killed)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_latents_of_another_autoencoder_are_refused_before_anything_is_built(cached_job, tmp_path, tiny_autoencoder):
    other = load_autoencoder(str(tiny_autoencoder))
    other.source = None
    with torch.no_grad():
        other.model.encoder.conv_in.weight.mul_(1.5)
    other.save(tmp_path / "other")
    config = cached_job(tmp_path / "run", px16={})
    config["vae"] = {"name": str(tmp_path / "other")}
    with pytest.raises(UserError) as caught:
        check_job(config)
    assert caught.value.where == "vae.name" and str(tiny_autoencoder) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_cannot_be_trained_on_latents(toy_vae_config, latents, changed):
    with pytest.raises(UserError) as caught:
        check_job(changed(toy_vae_config, data={"train": str(latents)}))
    assert caught.value.where == "data.train" and "latents" in str(caught.value)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Pictures whose resized whole is the crop, so that latents and images show the same."""
    folder, random = tmp_path_factory.mktemp("squares"), np.random.default_rng(3)
    with ShardWriter(folder) as writer:
        for number in range(8):
            pixels = random.integers(0, 255, size=(5, 5, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC).save(file, "PNG")
            writer.write(f"{number:05d}", {"png": file.getvalue(), "txt": "a red circle"})
    return folder


def test_losses_are_those_of_the_images_to_half_precision(squares, tiny_autoencoder, tiny_text_encoder, tmp_path):
    """Same samples, noise and times; only the rounding of the moments lies between the two."""
    assert encode(squares, tmp_path, tiny_autoencoder, 16) == 0
    text, vae = load_text_encoder(str(tiny_text_encoder)), load_autoencoder(str(tiny_autoencoder))
    torch.manual_seed(0)
    network = XUT(XUTConfig(4, 1, 32, 48, 2, 16, 16, depth=1))
    torch.nn.init.normal_(network.output_projection.weight, std=0.1)
    module = FlowModule(network, text, vae, learning_rate=0.1)
    losses, moments = {}, {}
    for folder in (squares, tmp_path):
        data = ShardDataModule(
            folder, resolution=16, batch_size=8, tokenizer=text.tokenizer, context_length=8, num_workers=0, lanes=2
        )
        (batch,) = data.val_dataloader()
        losses[folder] = module.validation_losses(dict(batch))
        moments[folder] = module.encoders.latents_of_batch(batch)
    torch.testing.assert_close(moments[tmp_path], moments[squares], rtol=2.0**-10, atol=1e-5)
    assert not torch.equal(moments[tmp_path], moments[squares])
    torch.testing.assert_close(losses[tmp_path], losses[squares], rtol=1e-3, atol=1e-4)
