"""What a diffusers folder must hold before anything is trained on its autoencoder."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from hdm_lightning.encoders import vae_folder
from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.vae_folder import (
    WEIGHTS_FILE,
    channels_of,
    check_shapes,
    encoder_fingerprint,
    factor_of,
    folder_fingerprint,
    read_autoencoder,
    read_config,
)
from hdm_lightning.errors import UserError

TINY = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "layers_per_block": 1,
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(**TINY).save_pretrained(tmp_path)
    return tmp_path


def edited(folder, edit):
    """Apply `edit` to a folder's tensors."""
    file = folder / WEIGHTS_FILE
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def renamed(tensors):
    """As diffusers named an attention's parts before 2023, which it still reads."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, before in old.items():
        tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    return tensors


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        read_autoencoder(folder, torch.float32, where="vae.name")
    assert caught.value.where == "vae.name" and caught.value.hint


def test_a_folder_is_read_as_it_was_written(folder):
    model = read_autoencoder(folder, torch.float64, where="vae.name")
    written = load_file(folder / WEIGHTS_FILE)
    assert model.dtype == torch.float64
    assert {name: tensor.float() for name, tensor in model.state_dict().items()}.keys() == written.keys()
    assert all(torch.equal(model.state_dict()[name].float(), tensor) for name, tensor in written.items())


def test_the_attention_of_older_files_is_read_under_its_older_names(folder):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = read_autoencoder(folder, torch.float32, where="vae.name").encode(image).latent_dist.mean
    edited(folder, renamed)
    assert any(".query." in name for name in load_file(folder / WEIGHTS_FILE))
    found = read_autoencoder(folder, torch.float32, where="vae.name").encode(image).latent_dist.mean
    assert torch.equal(found, expected)


def test_weights_that_are_missing_are_not_drawn_at_random(folder):
    edited(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if "decoder" not in name})
    refused(folder, r"lacks \d+ weights, decoder\.")


def test_weights_of_another_shape_are_refused(folder):
    edited(folder, lambda tensors: tensors | {"encoder.conv_out.bias": torch.zeros(3)})
    refused(folder, "encoder.conv_out.bias|size mismatch|cannot read")


def test_another_kind_of_autoencoder_is_refused(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"_class_name": "VQModel"}))
    refused(folder, "VQModel")


def test_a_config_that_is_no_object_is_refused(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a JSON object"):
        read_config(folder, where="vae.name")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"down_block_types": ["DownEncoderBlock2D"]}, "returns|cannot encode|4 × 4 cells"),
        (
            {"up_block_types": ["UpDecoderBlock2D"]},
            "returns|cannot encode",
        ),
        ({"in_channels": 4}, "cannot encode an image"),
        ({"out_channels": 4}, "returns"),
        ({"latent_channels": 0}, "cannot encode an image"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_network_that_takes_no_rgb_pictures_or_gives_back_another_size_is_refused(fields, message):
    with torch.device("meta"):
        model = AutoencoderKL(**{**TINY, **fields})
    with pytest.raises(UserError, match=message) as caught:
        check_shapes(model, where="autoencoder.config")
    assert caught.value.where == "autoencoder.config"


def test_the_config_of_a_whole_family_of_autoencoders_passes(folder):
    for channels, blocks in ((4, 2), (16, 4)):
        with torch.device("meta"):
            model = AutoencoderKL(
                block_out_channels=[32] * blocks,
                down_block_types=["DownEncoderBlock2D"] * blocks,
                up_block_types=["UpDecoderBlock2D"] * blocks,
                latent_channels=channels,
                use_quant_conv=channels == 4,
                use_post_quant_conv=channels == 4,
            )
        check_shapes(model, where="autoencoder.config")
    fields = read_config(folder, where="vae.name")
    assert fields == json.loads((folder / "config.json").read_text())


def test_factor_and_channels_are_those_of_the_model_also_where_config_json_leaves_them_out(folder):
    file = folder / "config.json"
    written = json.loads(file.read_text())
    del written["latent_channels"]
    file.write_text(json.dumps(written))
    fields = read_config(folder, where="vae.name")
    model = read_autoencoder(folder, torch.float32, where="vae.name")
    latent = model.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode()
    assert latent.shape == (1, channels_of(fields), 16 // factor_of(fields), 16 // factor_of(fields))
    assert channels_of({**fields, "latent_channels": 16}) == 16


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_fingerprint_builds_no_second_model(folder, monkeypatch, dtype):
    whole = encoder_fingerprint(read_autoencoder(folder, torch.float32, where="vae.name"))
    loaded = load_autoencoder(str(folder), dtype=dtype, mean=[0.0] * 4, std=[1.0] * 4)
    monkeypatch.setattr(vae_folder, "read_autoencoder", lambda *arguments, **options: pytest.fail("read once more"))
    assert loaded.fingerprint == whole
    lossy = {"float32": True, "bfloat16": False, "auto": True}[dtype]
    assert (encoder_fingerprint(loaded.model) == whole) == lossy


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
        renamed,
        lambda tensors: {**tensors, "decoder.conv_in.bias": tensors["decoder.conv_in.bias"] + 1},
    ],
    ids=["half", "renamed", "decoder"],
)
def test_a_fingerprint_of_a_file_is_that_of_the_model_that_diffusers_reads_from_it(folder, edit):
    edited(folder, edit)
    model = read_autoencoder(folder, torch.float32, where="vae.name")
    assert folder_fingerprint(folder, where="vae.name") == encoder_fingerprint(model)


def test_a_fingerprint_of_half_an_encoder_is_refused(folder):
    edited(folder, lambda tensors: {name: each for name, each in tensors.items() if name != "encoder.conv_in.bias"})
    with pytest.raises(UserError, match="lacks 1 weights") as caught:
        folder_fingerprint(folder, where="vae.name")
    assert caught.value.where == "vae.name" and caught.value.hint


def test_a_fingerprint_of_an_encoder_of_grey_images_says_what_to_change(tmp_path):
    AutoencoderKL(**TINY, in_channels=1, out_channels=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^vae\.name: cannot encode an image") as caught:
        folder_fingerprint(tmp_path, where="vae.name")
    assert "in_channels" in caught.value.hint
