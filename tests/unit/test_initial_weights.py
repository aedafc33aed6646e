"""What `init` takes from files of this project and from published ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hdm_lightning.cli import convert
from hdm_lightning.errors import UserError
from hdm_lightning.interop import published
from hdm_lightning.interop.layouts import read_release, write_single
from hdm_lightning.interop.model_card import recorded_license
from hdm_lightning.interop.release import Release
from hdm_lightning.interop.tensor_files import write_tensors
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from hdm_lightning.training.initial_weights import load_initial_weights, read_init, require_whole
from toy_run import random_network

CONFIG = XUTConfig(
    width=16, mlp_width=12, heads=1, head_dim=16, context_width=12, depth=2, decoder_blocks=2,
    blocks_after=1, **PUBLISHED,
)  # fmt: skip


def network(seed: int) -> XUT:
    return random_network(CONFIG, seed)


def same_values(found: XUT, expected: XUT) -> None:
    for (name, ours), theirs in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prefix", published.PREFIXES)
def test_a_published_file_gives_every_tensor(tmp_path: Path, prefix: str, dtype: torch.dtype, suffix: str) -> None:
    tensors = published.export_state_dict(network(0).to(dtype))
    path = tmp_path / f"released{suffix}"
    beside = {"vae_mean": torch.zeros(1, 4, 1, 1, dtype=dtype)} if prefix else {}
    write_tensors(path, {prefix + name: tensor for name, tensor in tensors.items()} | beside)
    model = network(1)
    report = load_initial_weights(model, str(path))
    assert (report.missing, report.reshaped, report.unused) == ([], [], [])
    assert len(report.loaded) == len(tensors)
    same_values(model, published.load_xut(CONFIG, tensors).float())


def test_what_does_not_fit_is_told_by_our_names(tmp_path: Path) -> None:
    tensors = published.export_state_dict(network(0))
    tensors["in_patch.proj.weight"] = torch.zeros(16, 3, 2, 2)
    del tensors["ctx_proj.bias"]
    write_tensors(tmp_path / "other.safetensors", tensors | {"more.weight": torch.zeros(1)})
    model = network(1)
    before = model.patch_embedding.weight.clone()
    report = load_initial_weights(model, str(tmp_path / "other.safetensors"))
    assert report.reshaped == ["patch_embedding.weight"]
    assert report.missing == ["text_projection.bias"]
    assert report.unused == ["more.weight"]
    assert torch.equal(model.patch_embedding.weight, before)


def test_a_folder_of_ours_gives_every_tensor(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", network(0).state_dict())
    model = network(1)
    assert load_initial_weights(model, str(tmp_path)).missing == []
    same_values(model, network(0))


def test_weights_of_another_wiring_are_warned_of(tmp_path: Path) -> None:
    write_tensors(tmp_path / "released.safetensors", published.export_state_dict(network(0)))
    write_tensors(tmp_path / "model.safetensors", network(0).state_dict())
    other = XUT(replace(CONFIG, residual="input", positions="area"))
    told = ["residual=normed (model.residual is input)", "positions=long_side (model.positions is area)"]
    assert load_initial_weights(other, str(tmp_path / "released.safetensors")).wiring == told
    assert load_initial_weights(other, str(tmp_path)).wiring == []  # nothing tells
    (tmp_path / "config.json").write_text(json.dumps({"xut": CONFIG.to_json()}))
    report = load_initial_weights(other, str(tmp_path))
    assert report.wiring == told
    assert f"warning: the weights were made for another wiring: {', '.join(told)}" in str(report)
    assert load_initial_weights(network(1), str(tmp_path)).wiring == []
    assert "warning" not in str(load_initial_weights(network(1), str(tmp_path / "released.safetensors")))


def test_files_without_a_model_are_told(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match="neither a safetensors nor a torch file"):
        load_initial_weights(network(1), str(tmp_path / "broken.safetensors"))
    write_tensors(tmp_path / "vae.safetensors", {"encoder.conv_in.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"init: no tensor belongs to an XUT") as caught:
        load_initial_weights(network(1), str(tmp_path / "vae.safetensors"))
    assert "unexpected (1): encoder.conv_in.weight" in str(caught.value)
    with pytest.raises(UserError, match="there is no model in"):
        load_initial_weights(network(1), str(tmp_path / "nothing"))


def test_weights_in_several_files_are_all_taken(tmp_path: Path) -> None:
    state = network(0).state_dict()
    folder, stem = tmp_path / "final" / "transformer", "diffusion_pytorch_model"
    folder.mkdir(parents=True)
    places = {}
    for number, names in enumerate((list(state)[::2], list(state)[1::2]), 1):
        file = f"{stem}-0000{number}-of-00002.safetensors"
        write_tensors(folder / file, {f"network.{name}": state[name] for name in names})
        places |= {f"network.{name}": file for name in names}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model = network(1)
    report = load_initial_weights(model, str(tmp_path))
    assert (report.missing, report.reshaped, report.unused) == ([], [], [])
    same_values(model, network(0))


def test_what_is_not_whole_is_no_base(tmp_path: Path) -> None:
    state = network(0).state_dict()
    write_tensors(tmp_path / "model.safetensors", state)
    require_whole(load_initial_weights(network(1), str(tmp_path)))
    del state["text_projection.bias"]
    write_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(UserError, match=r"1 missing \(text_projection.bias\)"):
        require_whole(load_initial_weights(network(1), str(tmp_path)))
    write_tensors(tmp_path / "released.safetensors", published.export_state_dict(network(0)))
    other = XUT(replace(CONFIG, residual="input"))
    with pytest.raises(UserError, match=r"1 wired differently"):
        require_whole(load_initial_weights(other, str(tmp_path / "released.safetensors")))
    state = network(0).state_dict() | {"patch_embedding.weight": torch.zeros(16, 3, 2, 2)}
    write_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(UserError, match=r"1 of another shape \(patch_embedding.weight\)"):
        require_whole(load_initial_weights(network(1), str(tmp_path)))


def test_a_single_file_states_its_wiring(tmp_path: Path) -> None:
    own, path = XUT(replace(CONFIG, skips="mirrored", positions="area")), tmp_path / "own.safetensors"
    write_single(path, Release(own))
    report = load_initial_weights(network(1), str(path))
    assert report.wiring == ["skips=mirrored (model.skips is last)", "positions=area (model.positions is long_side)"]
    assert (report.missing, report.reshaped, report.unused) == ([], [], [])
    other = XUT(own.config)
    assert load_initial_weights(other, str(path)).wiring == []
    same_values(other, own)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("net.safetensors", "cc-by-4.0"),
        ("transformer/diffusion_pytorch_model.safetensors", "cc-by-4.0"),
        ("downloads/net.safetensors", None),  # that of a project around is not the weights'
    ],
)
def test_the_license_is_that_of_the_weights_own_card(tmp_path: Path, weights: str, told: str | None) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    write_tensors(tmp_path / weights, published.export_state_dict(network(0)))
    assert load_initial_weights(network(1), str(tmp_path / weights)).license == told


def test_a_file_of_weights_carries_its_license_wherever_it_goes(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    write_tensors(tmp_path / "net.safetensors", published.export_state_dict(network(0)))
    folder = tmp_path / "elsewhere"
    for target, name in (("project", "model"), ("single", "one.safetensors"), ("published", "two.safetensors")):
        to, options = folder / target / name, ["--text-encoder", "a/b"] if target == "project" else []
        assert convert.main([str(tmp_path / "net.safetensors"), str(to), "--to", target, *options]) == 0
        assert load_initial_weights(network(1), str(to)).license == "cc-by-4.0"
        assert read_release(to).settings["training"]["license"] == "cc-by-4.0"
    single = folder / "single" / "one.safetensors"
    for target in ("diffusers", "bare", "project"):
        to = folder / target / (f"again{'.safetensors' if target == 'bare' else ''}")
        assert convert.main([str(single), str(to), "--to", target, "--text-encoder", "a/b"]) == 0
        assert load_initial_weights(network(1), str(to)).license == "cc-by-4.0"
        assert recorded_license(read_release(to).settings["training"]) == "cc-by-4.0"
    assert "cc-by-4.0." in (folder / "project" / "again" / "README.md").read_text().split("## License")[1]


@pytest.mark.parametrize(
    ("config", "base", "told"),
    [
        ("hub: {license: mit}", '{"source": "x", "license": "cc-by-4.0"}', "mit"),
        ("hub: {license: null}", '{"source": "x", "license": "cc-by-4.0"}', "cc-by-4.0"),
        ("hub: [", '{"source": "x", "license": "cc-by-4.0"}', "cc-by-4.0"),
        ("name: x", "{", None),
    ],
)
def test_the_license_of_a_checkpoint_is_its_run_s(tmp_path: Path, config: str, base: str, told: str | None) -> None:
    checkpoint = tmp_path / "run" / "01-px64" / "checkpoints" / "step-1.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"network.{name}": each for name, each in network(0).state_dict().items()}}, checkpoint)
    (tmp_path / "run" / "config.yaml").write_text(config)
    (tmp_path / "run" / "init.json").write_text(base)
    assert load_initial_weights(network(1), str(checkpoint)).license == told
    alone = checkpoint.rename(tmp_path / "step-1.ckpt")
    assert load_initial_weights(network(1), str(alone)).license is None


@pytest.mark.parametrize("content", [None, "", "[1]", "{", "[" * 5000])
def test_a_damaged_record_of_the_base_says_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "init.json").write_text(content)
    assert read_init(tmp_path) == {}
