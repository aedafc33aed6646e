"""hdm-evaluate vae: sizes that cannot be halved, and the statistics that training wants."""

import json

import pytest
import torch

from hdm_lightning.cli import evaluate
from hdm_lightning.encoders.autoencoder import load_autoencoder


@pytest.fixture(scope="module")
def measured(tiny_autoencoder, tiny_shards, tmp_path_factory):
    """An evaluation at 28 px: seven latent cells, which no scale of the measures divides."""
    out = tmp_path_factory.mktemp("evaluation")
    arguments = ["vae", str(tiny_autoencoder), "--data", str(tiny_shards), "--size", "28", "--out", str(out)]
    assert evaluate.main([*arguments, "--samples", "6", "--resamples", "20", "--set-resamples", "5"]) == 0
    return json.loads((out / "evaluation.json").read_text())["results"]["vae"]["autoencoder"]


def test_an_odd_latent_is_turned_and_not_halved(measured):
    names = {name for name in measured["measures"] if "equivariance" in name}
    turned = ("encoder_rotation", "decoder_rotation", "psnr_db_rotation")
    each = [f"encoder_rotation_{degrees}" for degrees in (90, 180, 270)]
    assert names == {f"equivariance_{key}" for key in (*turned, *each)}
    assert measured["measures"]["equivariance_psnr_db_rotation"]["unit"] == "dB"


def test_the_latents_statistics_normalise_them(measured, tiny_autoencoder, tiny_shards):
    from hdm_lightning.data.rules import StreamConfig, sources_from
    from hdm_lightning.data.sample_plan import Plan
    from hdm_lightning.evaluation.image_sets import middle_crops, real_images

    stream = middle_crops(StreamConfig(sources_from([str(tiny_shards)], "data"), 28, 1, stage="validation"))
    pictures = torch.cat([batch.images for batch in real_images(stream, Plan(stream), 6)])
    raw = load_autoencoder(str(tiny_autoencoder), mean=[0.0] * 4, std=[1.0] * 4).encode(pictures / 127.5 - 1)
    assert measured["record"]["latents_mean"] == pytest.approx(raw.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert measured["record"]["latents_std"] == pytest.approx(raw.std((0, 2, 3), correction=0).tolist(), rel=1e-4)
