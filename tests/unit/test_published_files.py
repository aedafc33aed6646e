"""Published layouts: every prefix and dtype there and back bit for bit, and messages for what does not fit."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.interop import published
from hdm_lightning.interop.layouts import (
    detect_layout,
    read_release,
    write_bare,
    write_comfyui,
    write_diffusers,
    write_published,
)
from hdm_lightning.interop.release import release_from_tensors, release_to_tensors
from hdm_lightning.interop.tensor_files import read_tensors, write_tensors
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from toy_run import random_network, same_bits

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*.safetensors"))
CONFIG = XUTConfig(
    width=16, mlp_width=12, heads=1, head_dim=16, context_width=12, depth=2, decoder_blocks=2,
    blocks_after=1, **PUBLISHED,
)  # fmt: skip


def golden_weights(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith("weight.")]  # noqa: SIM118 (not a dict)
        weights = {name.removeprefix("weight."): file.get_tensor(name) for name in names}
        return json.loads(file.metadata()["config"]), weights


def bare(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    network = random_network(CONFIG, std=1.0)
    return {name: tensor.to(dtype) for name, tensor in published.export_state_dict(network).items()}


def single_file(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {"unet.model." + name: tensor for name, tensor in bare(dtype).items()}
    tensors["vae.encoder.conv_in.weight"] = torch.randn(8, 3, 3, 3).to(dtype)
    tensors["vae.decoder.conv_out.bias"] = torch.randn(3).to(dtype)
    tensors["te.text_models.0.embed_tokens.weight"] = torch.randn(5, 12).to(dtype)
    tensors["vae_mean"] = torch.tensor([-3.86596, -1.33539, 0.83537, 0.90989]).view(1, 4, 1, 1).to(dtype)
    tensors["vae_std"] = torch.tensor([10.03651, 6.84843, 7.21382, 5.59132]).view(1, 4, 1, 1).to(dtype)
    return tensors


@pytest.mark.parametrize(
    ("path", "dtype", "prefix"),
    [
        *((path, torch.float16, "unet.model.") for path in GOLDEN),
        *((GOLDEN[0], torch.float32, prefix) for prefix in published.PREFIXES),
        (GOLDEN[0], torch.bfloat16, ""),
    ],
)
def test_golden_weights_survive_import_and_export(path: Path, dtype: torch.dtype, prefix: str) -> None:
    config, weights = golden_weights(path)
    cast = {name: tensor.to(dtype) for name, tensor in weights.items()}
    prefixed = {prefix + name: tensor for name, tensor in cast.items()} | {"vae_mean": torch.zeros(1, 4, 1, 1)}
    model = published.load_xut(config, prefixed)
    assert next(model.parameters()).dtype == dtype
    exported = published.export_state_dict(model)
    same_bits(exported, cast)
    same_bits(published.export_state_dict(published.load_xut(config, exported)), cast)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_configuration_can_be_read_off_the_tensors(path: Path) -> None:
    keys, weights = golden_weights(path)
    config = published.config_from_json(keys)
    assert published.infer_config({"unet.model." + n: t for n, t in weights.items()}) == config
    assert published.config_from_json(published.config_to_json(config)) == config


def test_configurations_without_routed_part_or_aspect_ratio() -> None:
    keys, _ = golden_weights(GOLDEN[0])
    config = published.config_from_json(keys | {"tread_config": None, "addon_info_embs_dim": None})
    assert (config.blocks_before, config.blocks_after, config.aspect_ratio) == (0, 0, False)
    model = XUT(config)
    assert published.infer_config(published.export_state_dict(model)) == config
    with pytest.raises(ValueError, match=r"architecture keys \['depth', 'dim'\] are missing"):
        published.config_from_json({key: value for key, value in keys.items() if key not in ("dim", "depth")})
    with pytest.raises(ValueError, match="addon_info_embs_dim is 3; expected 0 or 1"):
        published.config_from_json(keys | {"addon_info_embs_dim": 3})


def test_weights_from_published_code_drive_the_model_they_are_put_in() -> None:
    tensors = bare()
    model = published.load_xut(CONFIG, tensors)
    tensors["in_patch.proj.weight"].zero_()
    assert model.patch_embedding.weight.abs().sum() > 0
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_time_frequencies_are_whole_again(dtype: torch.dtype) -> None:
    model = published.load_xut(CONFIG, bare(dtype))
    assert torch.equal(model.time_embedding.frequencies, XUT(CONFIG).time_embedding.frequencies)
    other = bare(dtype)
    other["time_emb.freqs"] = other["time_emb.freqs"] * 2
    kept = published.load_xut(CONFIG, other)
    assert torch.equal(kept.time_embedding.frequencies.view(1, -1), other["time_emb.freqs"].float())
    same_bits(published.export_state_dict(kept), other)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_survives_reading_and_writing(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    expected, path = single_file(dtype), tmp_path / f"model{suffix}"
    write_tensors(path, expected)
    assert detect_layout(path) == "published file"
    release = read_release(path)
    assert (len(release.vae), len(release.text_encoder), release.left_out) == (2, 1, ())
    again = tmp_path / f"again{suffix}"
    write_tensors(again, release_to_tensors(release))
    same_bits(read_tensors(again), expected)
    assert [file.name for file in tmp_path.glob("*.part")] == []


def test_checkpoints_may_be_flat_or_lightning(tmp_path: Path) -> None:
    flat, nested = tmp_path / "flat.ckpt", tmp_path / "lightning.ckpt"
    torch.save(single_file(), flat)
    torch.save({"state_dict": single_file(), "epoch": 3, "hyper_parameters": {"lr": 0.5}}, nested)
    for path in (flat, nested):
        same_bits(release_to_tensors(read_release(path)), single_file())


def test_torch_files_without_named_tensors_are_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="contains no named tensors"):
        read_release(tmp_path / "list.pt")


def test_our_own_weights_without_their_configuration_are_told_so(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", XUT(CONFIG).state_dict())
    with pytest.raises(UserError, match="weights of this project without their configuration"):
        read_release(tmp_path / "model.safetensors")


def test_a_wrong_file_gets_a_list_of_what_differs() -> None:
    tensors = bare()
    del tensors["ctx_proj.bias"], tensors["backbone.dec_blocks.0.0.xattn.kv.weight"]
    tensors["backbone.dec_blocks.0.0.attn.q_norm.weight"] = torch.ones(16)
    tensors["in_patch.proj.bias"] = torch.zeros(17)
    with pytest.raises(ValueError, match="do not fit the network") as caught:
        published.load_xut(CONFIG, tensors)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  missing (2): ctx_proj.bias, backbone.dec_blocks.0.0.xattn.kv.weight",
        "  unexpected (1): backbone.dec_blocks.0.0.attn.q_norm.weight",
        "  mis-shaped (1): in_patch.proj.bias (17,) instead of (16,)",
    ]


def test_a_file_without_a_network_says_what_it_holds() -> None:
    other = {"model.diffusion_model.x": torch.zeros(1)}
    with pytest.raises(ValueError, match="no tensor belongs to an XUT") as caught:
        release_from_tensors(other)
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  missing (4): in_patch.proj.weight, ctx_proj.weight, ")
    assert lines[2] == "  unexpected (1): model.diffusion_model.x"
    with pytest.raises(ValueError, match="do not fit the network") as caught:
        published.load_xut(CONFIG, other)
    lines = str(caught.value).splitlines()
    assert lines[1].startswith(f"  missing ({len(bare())}): in_patch.proj.weight, ")
    assert lines[2] == "  unexpected (1): model.diffusion_model.x"


@pytest.mark.parametrize("prefix", published.PREFIXES)
def test_a_network_without_one_of_its_tensors_is_still_known_for_one(prefix: str) -> None:
    for lost in ("in_patch.proj.weight", "ctx_proj.weight", "backbone.enc_blocks.0.0.attn.rope.freqs"):
        tensors = {prefix + name: tensor for name, tensor in bare().items() if name != lost}
        with pytest.raises(ValueError, match=re.escape(f"\n  missing (1): {lost}") + "$"):
            release_from_tensors(tensors)
        with pytest.raises(ValueError, match=re.escape(f"do not fit the network\n  missing (1): {lost}") + "$"):
            published.load_xut(CONFIG, tensors)
    flat = {prefix + name: tensor for name, tensor in bare().items()}
    flat[prefix + "in_patch.proj.weight"] = flat[prefix + "in_patch.proj.weight"].flatten(1)
    with pytest.raises(
        ValueError, match=r"mis-shaped \(1\): in_patch\.proj\.weight \(16, 16\) instead of 4 dimensions"
    ):
        release_from_tensors(flat)


def test_tied_tensors_of_a_checkpoint_can_be_written_as_safetensors(tmp_path: Path) -> None:
    tensors = single_file()
    tensors["te.text_models.0.lm_head.weight"] = tensors["te.text_models.0.embed_tokens.weight"]
    torch.save({"state_dict": tensors}, tmp_path / "tied.ckpt")
    write_tensors(tmp_path / "apart.safetensors", release_to_tensors(read_release(tmp_path / "tied.ckpt")))
    same_bits(read_tensors(tmp_path / "apart.safetensors"), tensors)


def test_tensors_that_belong_to_no_part_are_reported() -> None:
    release = release_from_tensors(single_file() | {"loss.scale": torch.ones(1)})
    assert release.left_out == ("loss.scale",)


@pytest.mark.parametrize(("field", "other"), [("residual", "input"), ("skips", "mirrored"), ("positions", "area")])
def test_other_wirings_cannot_be_written_in_the_published_layout(tmp_path: Path, field: str, other: str) -> None:
    config = XUTConfig.from_json(CONFIG.to_json() | {field: other})
    release = release_from_tensors(single_file())
    changed = type(release)(XUT(config), vae=release.vae, vae_mean=release.vae_mean, vae_std=release.vae_std)
    for write in (write_published, write_bare, write_diffusers):
        with pytest.raises(ValueError, match=f"{field}='{other}' \\(published: '{PUBLISHED[field]}'\\)"):
            write(tmp_path / "file.safetensors", changed)
    write_comfyui(tmp_path / "file.safetensors", changed)
    assert detect_layout(tmp_path / "file.safetensors") == "single file"
    found = read_release(tmp_path / "file.safetensors")
    assert found.network.config == config
    same_bits(dict(found.network.state_dict()), dict(changed.network.state_dict()))
    same_bits(dict(found.vae), dict(changed.vae))


def test_comfyui_file_has_network_and_autoencoder_and_nothing_else(tmp_path: Path) -> None:
    release, path = release_from_tensors(single_file()), tmp_path / "comfy.safetensors"
    write_comfyui(path, release.cast(torch.float16))
    tensors = read_tensors(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    expected = {name: tensor.half() for name, tensor in single_file().items() if not name.startswith("te.")}
    same_bits(tensors, expected)
    assert tensors["vae_mean"].shape == (1, 4, 1, 1)
    lacking = release_from_tensors({n: t for n, t in single_file().items() if not n.startswith("vae.")})
    with pytest.raises(ValueError, match="the loader expects the autoencoder in the file, but vae is missing"):
        write_comfyui(path, lacking)


def test_casting_refuses_to_make_infinities() -> None:
    tensors = single_file()
    tensors["unet.model.ctx_proj.bias"][0] = 1e6
    with pytest.raises(ValueError, match=r"text_projection\.bias.*too large for torch\.float16"):
        release_from_tensors(tensors).cast(torch.float16)
