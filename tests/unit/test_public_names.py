"""What the package offers at its top: names that cost nothing until used, and loaders with one contract."""

import shutil
import subprocess
import sys

import pytest
import torch

import hdm_lightning
from hdm_lightning import load_autoencoder, load_text_encoder
from hdm_lightning.encoders.base import ImageAutoencoder, TextEncoder, place
from hdm_lightning.encoders.caches import CachedAutoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.precision import default_dtype, parse_dtype


def test_importing_the_package_imports_nothing_slow():
    slow = "{'torch', 'lightning', 'hydra', 'transformers', 'diffusers', 'numpy', 'yaml'}"
    code = f"import sys, hdm_lightning; raise SystemExit(bool({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_can_be_had_and_no_other():
    for name in hdm_lightning.__all__:
        assert getattr(hdm_lightning, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'FlowModul'"):
        _ = hdm_lightning.FlowModul


def test_a_text_encoder_brings_its_tokenizer(tiny_text_encoder):
    encoder = load_text_encoder(str(tiny_text_encoder), cache_size=4)
    assert isinstance(encoder, TextEncoder)
    tokenize = encoder.tokenizer.bind(8)
    ids, count = tokenize("a red circle")
    assert (len(ids), count) == (8, 3)
    assert encoder.encode(torch.tensor([ids]), torch.tensor([count])).shape == (1, 8, encoder.width)


@pytest.mark.parametrize("inside", ["", "vae", "final", "final/vae"])
def test_an_autoencoder_is_found_where_runs_and_pipelines_keep_it(tmp_path, tiny_autoencoder, inside):
    shutil.copytree(tiny_autoencoder, tmp_path / "run" / inside, dirs_exist_ok=True)
    if inside.endswith("vae"):  # a pipeline's own description, of a model that is none
        (tmp_path / "run" / inside).with_name("config.json").write_text('{"xut": {}}')
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = load_autoencoder(str(tiny_autoencoder)).encode(image)
    for name in {"run", f"run/{inside}".removesuffix("/vae").rstrip("/")}:
        found = load_autoencoder(str(tmp_path / name))
        assert isinstance(found, ImageAutoencoder)
        assert torch.equal(found.encode(image), expected)


def test_latents_are_remembered_where_asked_for(tiny_autoencoder):
    cached = load_autoencoder(str(tiny_autoencoder), cache_size=2)
    assert isinstance(cached, CachedAutoencoder)
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(cached.encode(image), cached.encode(image))
    assert (cached.hits, cached.misses) == (1, 1)


def test_a_saved_autoencoder_states_one_normalisation(tmp_path, tiny_autoencoder):
    """diffusers applies a scaling factor on top of mean and standard deviation, so it must be 1 beside them."""
    from diffusers import AutoencoderKL

    load_autoencoder(str(tiny_autoencoder), mean=[0.1] * 4, std=[2.0] * 4).save(tmp_path)
    config = AutoencoderKL.from_pretrained(str(tmp_path), low_cpu_mem_usage=False).config
    assert (config.scaling_factor, config.shift_factor) == (1.0, None)
    assert list(config.latents_mean) == pytest.approx([0.1] * 4) and list(config.latents_std) == [2.0] * 4
    again = load_autoencoder(str(tmp_path))
    image = torch.rand(1, 3, 16, 16)
    raw = load_autoencoder(str(tiny_autoencoder), mean=[0.0] * 4, std=[1.0] * 4).encode(image)
    torch.testing.assert_close(again.encode(image), (raw - 0.1) / 2.0)


def test_auto_follows_the_device(monkeypatch):
    assert default_dtype("cpu") == torch.float32
    for capability, dtype in (((8, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert default_dtype("cuda:1") == dtype
    assert parse_dtype("auto", where="vae.dtype") is None
    assert parse_dtype("float16", where="vae.dtype") == parse_dtype(torch.float16, where="") == torch.float16
    with pytest.raises(UserError, match=r"vae\.dtype: is 'half'"):
        load_autoencoder("anywhere/vae", dtype="half")


def test_only_parameters_are_cast_by_auto():
    """Rotary frequencies are buffers, and rounded ones turn late tokens by the wrong angle."""
    layer = torch.nn.BatchNorm1d(2).double()
    place(layer, "cpu", auto=True)
    assert layer.weight.dtype == torch.float32
    assert layer.running_mean.dtype == torch.float64
    place(layer.half(), "cpu", auto=False)
    assert layer.weight.dtype == torch.float16
