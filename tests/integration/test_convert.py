"""hdm-convert through every layout and back, with a real autoencoder's tensors."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hdm_lightning.cli.command import INTERRUPTED_STATUS
from hdm_lightning.cli.convert import main, parser
from hdm_lightning.interop import published
from hdm_lightning.interop.pipeline_folder import read_pipeline_folder
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from toy_run import random_network, same_bits

CONFIG = XUTConfig(
    width=16, mlp_width=12, heads=1, head_dim=16, context_width=16, depth=2, decoder_blocks=2,
    blocks_after=1, **PUBLISHED,
)  # fmt: skip


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32", "float16"])
def released(request: pytest.FixtureRequest, tmp_path: Path, tiny_autoencoder: Path) -> Path:
    """A published single file whose every tensor is random."""
    exported = published.export_state_dict(random_network(CONFIG))
    tensors = {"unet.model." + name: tensor for name, tensor in exported.items()}
    vae = load_file(tiny_autoencoder / "diffusion_pytorch_model.safetensors")
    tensors |= {"vae." + name: tensor for name, tensor in vae.items()}
    tensors |= {"vae_mean": torch.randn(1, 4, 1, 1), "vae_std": torch.rand(1, 4, 1, 1) + 0.5}
    tensors |= {"te.text_models.0.embed_tokens.weight": torch.randn(7, 16)}
    path = tmp_path / "released.safetensors"
    save_file({name: tensor.to(request.param) for name, tensor in tensors.items()}, path)
    return path


def convert(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_to_a_project_folder_and_back_bit_for_bit(released: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back.safetensors"
    assert convert(released, ours, "--text-encoder", "some/encoder") == 0
    assert convert(ours, back) == 0
    same_bits(load_file(back), load_file(released))


def test_the_project_folder_is_a_pipeline_s_that_computes_the_same(released: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    assert convert(released, ours, "--text-encoder", "some/encoder", "--dtype", "float32") == 0
    found = read_pipeline_folder(ours)
    assert (found.xut, found.text_encoder.name) == (CONFIG, "some/encoder")
    written = json.loads((ours / "vae" / "config.json").read_text())
    assert written["latents_mean"] == load_file(released)["vae_mean"].double().flatten().tolist()
    assert "some/encoder" in (ours / "README.md").read_text()
    latent, t, context = torch.randn(1, 4, 4, 4), torch.rand(1), torch.randn(1, 3, 16)
    reference = published.load_xut(CONFIG, load_file(released)).float()
    with torch.no_grad():
        found, expected = found.load_network()(latent, t, context), reference(latent, t, context)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_through_a_diffusers_folder_and_back(released: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    folder, back = tmp_path / "diffusers", tmp_path / "back.safetensors"
    assert convert(released, folder, "--to", "diffusers") == 0
    keys = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").keys()
    assert all(name.startswith("model.") for name in keys)
    assert published.config_from_json(json.loads((folder / "unet" / "config.json").read_text())) == CONFIG
    assert convert(folder, back) == 0
    expected = {n: t for n, t in load_file(released).items() if not n.startswith("te.")}
    same_bits(load_file(back), expected)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_num_groups": 4}))
    vae = AutoencoderKL.from_pretrained(str(folder / "vae"), low_cpu_mem_usage=False)
    stored = {n.removeprefix("vae."): t.float() for n, t in expected.items() if n.startswith("vae.")}
    same_bits({name: tensor.float() for name, tensor in vae.state_dict().items()}, stored)


def test_to_a_checkpoint_and_back(released: Path, tmp_path: Path) -> None:
    checkpoint, back = tmp_path / "model.ckpt", tmp_path / "back.safetensors"
    assert convert(released, checkpoint) == 0
    assert "state_dict" in torch.load(checkpoint, weights_only=True)
    assert convert(checkpoint, back) == 0
    same_bits(load_file(back), load_file(released))


def test_to_the_file_for_comfyui(released: Path, tmp_path: Path) -> None:
    ours, path = tmp_path / "ours", tmp_path / "comfy.safetensors"
    assert convert(released, ours, "--text-encoder", "some/encoder") == 0
    assert convert(ours, path, "--to", "comfyui") == 0
    expected = {n: t.half() for n, t in load_file(released).items() if not n.startswith("te.")}
    same_bits(load_file(path), expected)


def test_the_network_alone(released: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    assert convert(released, path, "--to", "bare") == 0
    same_bits(load_file(path), published.strip_prefix(load_file(released)))


@pytest.fixture
def own_wiring(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A pipeline's folder of a network that is wired as no published one."""
    ours = tmp_path / "ours"
    convert(released, ours, "--text-encoder", "some/encoder")
    file = ours / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"skips": "mirrored"}))
    capsys.readouterr()
    return ours


def test_other_wirings_go_to_a_folder_but_not_to_published_layouts(
    own_wiring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(own_wiring, tmp_path / "again") == 0
    for target in ("published", "bare", "diffusers"):
        assert convert(own_wiring, tmp_path / "file.safetensors", "--to", target) == 2
        assert "skips='mirrored' (published: 'last')" in capsys.readouterr().err
    assert not (tmp_path / "file.safetensors").exists()


def test_other_wirings_go_to_a_single_file_and_back_bit_for_bit(
    own_wiring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, back = tmp_path / "file.safetensors", tmp_path / "back"
    assert convert(own_wiring, file) == 0
    assert "single, from project folder" in capsys.readouterr().out
    assert convert(file, back) == 0
    assert "project, from single file" in capsys.readouterr().out
    found, expected = (read_pipeline_folder(folder) for folder in (back, own_wiring))
    assert (found.xut, found.text_encoder, found.sampling) == (expected.xut, expected.text_encoder, expected.sampling)
    assert found.xut.skips == "mirrored"
    for part in ("transformer", "vae", "published_text_encoder"):
        name = "model" if part.startswith("published") else "diffusion_pytorch_model"
        same_bits(load_file(back / part / f"{name}.safetensors"), load_file(own_wiring / part / f"{name}.safetensors"))
        if part == "vae":
            assert (back / part / "config.json").read_text() == (own_wiring / part / "config.json").read_text()


def test_other_wirings_go_to_comfyui_as_a_single_file_that_names_its_reader(
    own_wiring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "comfy.safetensors"
    assert convert(own_wiring, file, "--to", "comfyui") == 0
    told = capsys.readouterr().out
    assert "skips mirrored" in told and "HDM-ext cannot" in told
    assert {name.partition(".")[0] for name in load_file(file)} == {"network", "vae", "vae_mean", "vae_std"}
    assert all(tensor.dtype == torch.half for name, tensor in load_file(file).items() if "frequencies" not in name)
    assert convert(own_wiring, tmp_path / "comfy.ckpt", "--to", "comfyui") == 2
    assert "only .safetensors can record the wiring" in capsys.readouterr().err


def test_of_a_published_wiring_it_says_what_the_published_loader_cannot_have(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(released, tmp_path / "comfy.safetensors", "--to", "comfyui") == 0
    told = capsys.readouterr().err
    assert all(words in told for words in ("HDM-ext", "width 16", "depth 2", "mean and std of the latents"))


def test_a_single_file_with_a_broken_record_is_refused(
    own_wiring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.safetensors"
    convert(own_wiring, file)
    tensors = load_file(file)
    for record, told in (
        ({"xut": {"width": 24, "heads": 1}}, "width is 24; expected heads * head_dim"),
        ({"xut": 3}, "expected an object, got int"),
        ({"xut": {**CONFIG.to_json(), "depth": 3}}, "the tensors do not fit the network"),
    ):
        save_file(tensors, file, {"hdm_lightning": json.dumps(record)})
        capsys.readouterr()
        assert convert(file) == 2
        assert told in capsys.readouterr().err


def test_without_a_destination_it_tells_what_there_is(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(released) == 0
    told = capsys.readouterr().out
    for words in ("published file", f"{sum(p.numel() for p in XUT(CONFIG).parameters()):,} parameters", "heads"):
        assert words in told


def test_weights_beside_a_configuration_that_are_missing_or_broken_are_told(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours"
    convert(released, ours, "--text-encoder", "some/encoder")
    assert convert(ours) == 0
    assert "trained with some/encoder" in capsys.readouterr().out
    assert convert(ours / "transformer" / "diffusion_pytorch_model.raw.safetensors") == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    weights = ours / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"cut short")
    for path in (ours, weights):
        assert convert(path) == 2
        assert "neither a safetensors nor a torch file" in capsys.readouterr().err


def test_mistakes_end_with_one_message(
    released: Path, tmp_path: Path, tiny_autoencoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path / "nothing", tmp_path / "out") == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert convert(released, released) == 2
    assert "add --force" in capsys.readouterr().err
    assert convert(released, tmp_path / "out") == 2
    assert "--text-encoder" in capsys.readouterr().err
    assert convert(released, tmp_path / "out", "--vae", tmp_path) == 2
    assert "contains no diffusers autoencoder" in capsys.readouterr().err
    assert convert(tiny_autoencoder, tmp_path / "out") == 2
    assert "XUT" in capsys.readouterr().err
    for name, target in (("model", "comfyui"), ("model.v2", "published"), ("model", "bare")):
        assert convert(released, tmp_path / name, "--to", target) == 2
        assert "hint: use .safetensors or .ckpt" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    assert convert(released, tmp_path, "--to", "comfyui", "--force") == 2
    assert "--to comfyui writes one file" in capsys.readouterr().err
    assert convert(released, released / "inside.safetensors") == 2
    assert "inside.safetensors: cannot be written (" in capsys.readouterr().err
    (tmp_path / "folder.ckpt").mkdir()
    assert convert(released, tmp_path / "folder.ckpt", "--force") == 2
    assert "is a folder, and --to published writes a file" in capsys.readouterr().err
    assert convert(released, released, "--to", "project", "--force") == 2
    assert "is a file, and --to project writes a folder" in capsys.readouterr().err
    bare = tmp_path / "bare.safetensors"
    assert convert(released, bare, "--to", "bare") == 0
    assert convert(bare, tmp_path / "comfy.safetensors", "--to", "comfyui") == 2
    assert "vae, vae_mean, vae_std is missing" in capsys.readouterr().err
    assert convert(bare, tmp_path / "comfy.safetensors", "--to", "comfyui", "--vae", tiny_autoencoder) == 0


@pytest.mark.parametrize("released", [torch.float32], indirect=True)
@pytest.mark.parametrize(("target", "ended"), [("project", signal.SIGKILL), ("diffusers", signal.SIGINT)])
def test_an_interrupted_conversion_leaves_no_half_folder(
    released: Path, tmp_path: Path, target: str, ended: signal.Signals
) -> None:
    """It dies when two of the folder's files are there."""
    dying = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
from hdm_lightning import whole_files
put, written = whole_files._put_in_place, []
def dies(temporary, path, mode, **named):
    put(temporary, path, mode, **named)
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), {int(ended)})
whole_files._put_in_place = dies
from hdm_lightning.cli.convert import main
sys.exit(main(sys.argv[1:]))
"""
    asked = [str(released), str(tmp_path / "out"), "--to", target, "--text-encoder", "some/encoder"]
    died = subprocess.run([sys.executable, "-c", dying, *asked], capture_output=True, text=True, check=False)
    assert died.returncode == (INTERRUPTED_STATUS if ended is signal.SIGINT else -ended), died.stderr
    left = [path for path in tmp_path.iterdir() if path != released]
    assert all(path.name.startswith(".") for path in left)
    assert len(left) == (ended is signal.SIGKILL)
    assert convert(*asked) == 0
    back = tmp_path / "back.safetensors"
    assert convert(tmp_path / "out", back, "--to", "bare") == 0
    expected = {name: tensor for name, tensor in load_file(released).items() if name.startswith("unet.model.")}
    same_bits(load_file(back), {name.removeprefix("unet.model."): tensor for name, tensor in expected.items()})


@pytest.mark.parametrize(
    "words", [["x", "y", "--to", "single"], ["x", "--to", "single", "y"], ["--to", "single", "x", "y"]], ids=" ".join
)
def test_options_stand_before_between_and_behind_the_places(words):
    given = parser().parse_args(words)
    assert (str(given.source), str(given.destination), given.to) == ("x", "y", "single")
