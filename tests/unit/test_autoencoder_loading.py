"""Frozen autoencoders from folders and tensors, and the normalization of their latents."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from hdm_lightning.encoders.autoencoder import autoencoder_from_tensors, latent_statistics, load_autoencoder
from hdm_lightning.encoders.base import ImageAutoencoder
from hdm_lightning.encoders.vae_folder import infer_config
from hdm_lightning.errors import UserError
from hdm_lightning.interop.layouts import read_vae_folder, write_vae_folder
from hdm_lightning.interop.release import Release


@pytest.mark.parametrize("channels", [4, 16])
def test_latents_are_normalised_and_sampled_by_given_noise(tmp_path, channels):
    mean, std = [0.1 * i for i in range(channels)], [0.5 + 0.1 * i for i in range(channels)]
    reference = save_vae(tmp_path, latent_channels=channels, latents_mean=mean, latents_std=std)
    vae = load_autoencoder(str(tmp_path), max_pixels=200)
    assert isinstance(vae, ImageAutoencoder)
    assert (vae.channels, vae.factor) == (channels, 2)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 3, 8, 12, generator=generator) * 2 - 1
    noise = torch.randn(3, channels, 4, 6, generator=generator)
    with torch.no_grad():
        posterior = reference.encode(image).latent_dist
    shape = (1, -1, 1, 1)
    centre, spread = torch.tensor(mean).reshape(shape), torch.tensor(std).reshape(shape)
    torch.testing.assert_close(vae.encode(image), (posterior.mean - centre) / spread)
    sampled = (posterior.mean + posterior.std * noise - centre) / spread
    torch.testing.assert_close(vae.encode(image, noise=noise), sampled)
    with torch.no_grad():
        decoded = reference.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(vae.decode(vae.encode(image)), decoded, rtol=1e-4, atol=1e-5)


def test_scaling_factor_alone_is_the_normalisation_and_nothing_is_an_error(tmp_path):
    reference = save_vae(tmp_path, scaling_factor=0.25, shift_factor=0.5)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = (reference.encode(image).latent_dist.mean - 0.5) * 0.25
    torch.testing.assert_close(load_autoencoder(str(tmp_path)).encode(image), expected)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("scaling_factor", "latents_mean", "latents_std"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: states no normalization"):
        load_autoencoder(str(tmp_path))
    given = load_autoencoder(str(tmp_path), mean=[0.5] * 4, std=[4.0] * 4)
    torch.testing.assert_close(given.encode(image), expected)
    with pytest.raises(UserError, match="expected 4 numbers"):
        load_autoencoder(str(tmp_path), mean=[0.0], std=[1.0])


def test_a_saved_autoencoder_loads_with_its_normalisation_and_its_exact_weights(tmp_path, tiny_autoencoder):
    vae = load_autoencoder(str(tiny_autoencoder), dtype=torch.bfloat16, mean=[1.0] * 4, std=[2.0] * 4)
    vae.save(tmp_path / "vae")
    again, original = load_autoencoder(str(tmp_path / "vae")), load_autoencoder(str(tiny_autoencoder))
    assert again.mean.flatten().tolist() == [1.0] * 4
    assert again.std.flatten().tolist() == [2.0] * 4
    for ours, theirs in zip(again.model.parameters(), original.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_autoencoder_is_rebuilt_from_bare_tensors(tmp_path):
    reference = save_vae(tmp_path, block_out_channels=(32, 64), norm_num_groups=32, layers_per_block=2)
    tensors = reference.state_dict()
    config = infer_config(tensors)
    assert {key: reference.config[key] for key in config} == {
        **config,
        **{key: list(value) for key, value in config.items() if isinstance(reference.config[key], list)},
    }
    vae = autoencoder_from_tensors(tensors, [0.0] * 4, [1.0] * 4)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(image), reference.encode(image).latent_dist.mean)
    with pytest.raises(ValueError, match=r"encoder\.conv_out"):
        autoencoder_from_tensors({}, [0.0], [1.0])
    for end in ("encoder.conv_in.weight", "decoder.conv_out.weight"):
        with pytest.raises(ValueError, match=f"no {end}"):
            infer_config({name: tensor for name, tensor in tensors.items() if name != end})


def test_tensors_that_do_not_tell_their_shape_ask_for_a_config(tmp_path):
    reference = save_vae(tmp_path, block_out_channels=(32, 32), norm_num_groups=16, layers_per_block=0)
    tensors, config = reference.state_dict(), dict(reference.config)
    with pytest.raises(ValueError, match=r"resnets\.0.*needs its config\.json"):
        infer_config(tensors)
    vae = autoencoder_from_tensors(tensors, [0.0] * 4, [1.0] * 4, config=config)
    image = torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(image), reference.encode(image).latent_dist.mean)


@pytest.mark.parametrize("written_by", ["encoder", "converter"])
def test_diffusers_reads_the_same_pictures_from_our_latents(tmp_path, written_by):
    """By the formula of its pipelines, whatever scaling factor the autoencoder had before."""
    save_vae(tmp_path / "original", scaling_factor=0.13025, shift_factor=0.1)
    mean, std = [0.3, -0.2, 0.1, 0.0], [2.0, 3.0, 4.0, 0.5]
    ours = load_autoencoder(str(tmp_path / "original"), mean=mean, std=std)
    if written_by == "encoder":
        ours.save(tmp_path / "vae")
    else:
        files = read_vae_folder(tmp_path / "original")
        write_vae_folder(tmp_path / "vae", Release(None, files["vae"], files["vae_config"], ours.mean, ours.std))
    theirs = AutoencoderKL.from_pretrained(str(tmp_path / "vae"), low_cpu_mem_usage=False)
    config = theirs.config
    assert config.shift_factor is None
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = ours.encode(image)
    shape = (1, -1, 1, 1)
    centre, spread = torch.tensor(config.latents_mean).view(shape), torch.tensor(config.latents_std).view(shape)
    with torch.no_grad():
        decoded = theirs.decode(latents * spread / config.scaling_factor + centre).sample
        raw = theirs.encode(image).latent_dist.mean
    torch.testing.assert_close(latents * spread / config.scaling_factor + centre, raw)
    torch.testing.assert_close(decoded.clamp(-1, 1), ours.decode(latents))
    again = load_autoencoder(str(tmp_path / "vae"))
    torch.testing.assert_close(again.encode(image), latents)


@pytest.mark.parametrize(("there", "missing"), [("mean", "std"), ("std", "mean")])
def test_half_a_normalisation_names_the_half_that_is_missing(tmp_path, there, missing):
    save_vae(tmp_path, **{f"latents_{there}": [1.0] * 4}, scaling_factor=0.5)
    with pytest.raises(UserError, match=f"latents_{missing}: is missing, while latents_{there} is set") as caught:
        load_autoencoder(str(tmp_path))
    assert caught.value.where.endswith("config.json")
    with pytest.raises(UserError, match="is missing, while") as caught:
        load_autoencoder(str(tmp_path), **{there: [1.0] * 4}, where="vae.name")
    assert caught.value.where == f"vae.{missing}"
    assert load_autoencoder(str(tmp_path), mean=[0.0] * 4, std=[2.0] * 4).std.unique().item() == 2.0


@pytest.mark.parametrize(
    ("key", "value"),
    [*(("mean", odd) for odd in ([1.0] * 3, ["x"] * 4, [float("inf")] * 4, 3.0)), ("std", [0.0] * 4), ("std", [1])],
)
def test_an_odd_normalisation_names_its_key_and_not_the_file(tmp_path, key, value):
    save_vae(tmp_path)
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(tmp_path), **{"mean": [0.0] * 4, "std": [1.0] * 4, key: value}, where="vae.name")
    assert caught.value.where == f"vae.{key}"


def save_vae(folder, **changes):
    config = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        **changes,
    }
    torch.manual_seed(0)
    model = AutoencoderKL(**config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "written",
    [
        *(
            {"latents_mean": odd, "latents_std": [1.0, 1.0]}
            for odd in (3.5, "12", [1, None], [[1], 2], [float("nan"), 1])
        ),
        *(
            {"latents_mean": [0, 0], "latents_std": odd}
            for odd in (True, {}, [0.0, 1.0], [1], [10**400, 1], ["1", "1"])
        ),
        *({"scaling_factor": odd} for odd in ("x", 0, -1, float("inf"), [1], 10**400)),
        {"scaling_factor": 1.0, "shift_factor": "x"},
    ],
)
def test_odd_statistics_of_latents_name_their_file(written):
    with pytest.raises(UserError) as caught:
        latent_statistics(written, 2, where="config.json")
    wrong = [key for key in written if str(caught.value.what).startswith(key)]
    assert caught.value.where == "config.json" and len(wrong) == 1
    assert latent_statistics({"scaling_factor": 2, "shift_factor": 1}, 2, where="x") == ([1.0, 1.0], [0.5, 0.5])
