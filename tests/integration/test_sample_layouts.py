"""hdm-sample draws the same pictures from every layout that a trained network is released in."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from hdm_lightning.cli import convert, sample
from hdm_lightning.encoders.autoencoder import KLAutoencoder, load_autoencoder
from hdm_lightning.encoders.pretrained import TextEncoderSource
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.errors import UserError
from hdm_lightning.generation.image_files import read_record
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.generation.stored_pipeline import save_final
from hdm_lightning.interop import published
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from hdm_lightning.training.base_model import base_folder
from toy_run import shaken_network, write_final

CONFIG = XUTConfig(
    channels=4, patch_size=1, width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=1,
    decoder_blocks=1, **PUBLISHED,
)  # fmt: skip
MEAN, STD = [0.1, 0.2, -0.3, 0.4], [0.5, 0.6, 0.7, 0.8]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPT, SEED = "a large red circle", 7
SETTINGS = SamplingSettings(height=32, width=48, steps=3, guidance_scale=2.0)
DRAW = [PROMPT, "--seed", str(SEED), "--size", "48x32", "--steps", "3", "--guidance", "2"]


def network() -> XUT:
    return shaken_network(CONFIG).eval()


def autoencoder() -> KLAutoencoder:
    torch.manual_seed(1)
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 32],
    )
    return KLAutoencoder(model, MEAN, STD)


def in_dtype(tensors, dtype):
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}


def released_tensors(dtype, prefix="unet.model.", *, vae=True, text=True):
    tensors = {prefix + name: value for name, value in published.export_state_dict(network()).items()}
    if vae:
        tensors |= {f"vae.{name}": value for name, value in autoencoder().model.state_dict().items()}
        tensors |= {
            f"vae_{name}": torch.tensor(value).view(1, 4, 1, 1) for name, value in (("mean", MEAN), ("std", STD))
        }
    if text:
        tensors["te.text_models.0.embed_tokens.weight"] = torch.randn(5, 16)
    return in_dtype(tensors, dtype)


def write_single(path, dtype):
    save_file(released_tensors(dtype), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_flat_checkpoint(path, dtype):
    torch.save(released_tensors(dtype, "model."), path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def write_lightning_checkpoint(path, dtype):
    content = {"state_dict": released_tensors(dtype, text=False), "epoch": 1, "hyper_parameters": {"lr": 0.5}}
    torch.save(content, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def write_diffusers(path, dtype):
    (path / "unet").mkdir(parents=True)
    suffix = ".fp16" if dtype == torch.float16 else ""
    weights = f"diffusion_pytorch_model{suffix}.safetensors"
    save_file(released_tensors(dtype, "model.", vae=False, text=False), path / "unet" / weights)
    (path / "unet" / "config.json").write_text(json.dumps(published.config_to_json(CONFIG)))
    (path / "model_index.json").write_text("{}")
    autoencoder().save(path / "vae")
    stored = in_dtype(autoencoder().model.state_dict(), dtype)
    save_file(stored, path / "vae" / "diffusion_pytorch_model.safetensors")
    return path


LAYOUTS = [write_single, write_flat_checkpoint, write_lightning_checkpoint, write_diffusers]


def pixels(folder):
    (file,) = folder.glob("*.png")
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def expected(tiny_text_encoder):
    """What network and autoencoder draw in float32 with their values as stored in a precision."""

    def draw(dtype):
        model, vae = network(), autoencoder()
        model.load_state_dict(in_dtype(model.state_dict(), dtype))
        vae.model.load_state_dict(in_dtype(vae.model.state_dict(), dtype))
        # The time frequencies are a formula: half precision in a file does not round them.
        model.time_embedding.frequencies.copy_(network().time_embedding.frequencies)
        encoder = load_text_encoder(str(tiny_text_encoder))
        pipeline = HDMPipeline(model, vae, text_encoder=encoder, context_length=512)
        return pipeline.draw([PROMPT], [SEED], SETTINGS)[0].permute(1, 2, 0).numpy().astype(int)

    return {dtype: draw(dtype) for dtype in (torch.float32, torch.float16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_every_layout_draws_the_same(tmp_path, tiny_text_encoder, expected, write, dtype, capsys):
    model = write(tmp_path / "hdm", dtype)
    encoder = ["--text-encoder", str(tiny_text_encoder)]
    assert sample.main([str(model), *DRAW, *encoder, "--out", str(tmp_path / "a")]) == 0, capsys.readouterr().err
    # float16 rounds the normalisation in a single file too, by less than a thousandth.
    tolerance = 1 if dtype == torch.float32 else 3
    assert np.abs(pixels(tmp_path / "a") - expected[dtype]).max() <= tolerance
    (file,) = (tmp_path / "a").glob("*.png")
    assert read_record(file).model == str(model)
    assert sample.main(["--repeat", str(file), *encoder, "--out", str(tmp_path / "b")]) == 0
    assert "warning" not in capsys.readouterr().err
    assert np.array_equal(pixels(tmp_path / "a"), pixels(tmp_path / "b"))


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_half_precision_files_run_in_float32(tmp_path, tiny_text_encoder, write):
    loaded = load_pipeline(write(tmp_path / "hdm", torch.float16), LoadOptions(text_encoder=str(tiny_text_encoder)))
    assert {value.dtype for value in loaded.pipeline.network.state_dict().values()} == {torch.float32}
    assert loaded.pipeline.autoencoder.dtype == torch.float32


def test_half_precision_folders_of_ours_run_in_float32(tmp_path, tiny_text_encoder, expected):
    source = write_single(tmp_path / "hdm", torch.float16)
    assert convert.main([str(source), str(tmp_path / "ours"), "--text-encoder", str(tiny_text_encoder)]) == 0
    for number, path in enumerate([tmp_path / "ours", tmp_path / "ours" / WEIGHTS]):
        assert sample.main([str(path), *DRAW, "--out", str(tmp_path / str(number))]) == 0
        assert np.abs(pixels(tmp_path / str(number)) - expected[torch.float16]).max() <= 3
    model = load_pipeline(tmp_path / "ours", LoadOptions()).pipeline.network
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_a_file_written_here_remembers_its_text_encoder_and_settings(tmp_path, tiny_text_encoder, tiny_autoencoder):
    """Also the autoencoder's configuration, which its tensors do not tell in full."""
    sampling = {"height": 32, "width": 48, "steps": 3, "guidance_scale": 2.0}
    state = network().state_dict()
    write_final(tmp_path / "final", tiny_text_encoder, tiny_autoencoder, state, config=CONFIG, sampling=sampling)
    assert convert.main([str(tmp_path / "final"), str(tmp_path / "hdm.safetensors")]) == 0
    for place, model in (("a", tmp_path / "final"), ("b", tmp_path / "hdm.safetensors")):
        assert sample.main([str(model), PROMPT, "--out", str(tmp_path / place)]) == 0
    assert np.array_equal(pixels(tmp_path / "a"), pixels(tmp_path / "b"))


def test_a_single_file_of_any_wiring_draws_as_its_folder(tmp_path, tiny_text_encoder, tiny_autoencoder):
    own = XUT(replace(CONFIG, residual="input", skips="mirrored", positions="area"))
    save_final(
        tmp_path / "final",
        {name: value + 0.05 * torch.randn_like(value) for name, value in own.state_dict().items()},
        xut=own.config,
        text_encoder=TextEncoderSource(str(tiny_text_encoder), layer=1, context_length=6),
        autoencoder=load_autoencoder(str(tiny_autoencoder), mean=MEAN, std=STD),
        sampling={"height": 32, "width": 48, "steps": 3, "guidance_scale": 2.0, "solver": "heun", "shift": 1.7},
    )
    file = tmp_path / "own.safetensors"
    assert convert.main([str(tmp_path / "final"), str(file)]) == 0
    for place, model in (("a", tmp_path / "final"), ("b", file)):
        assert sample.main([str(model), PROMPT, "--out", str(tmp_path / place)]) == 0
    assert np.array_equal(pixels(tmp_path / "a"), pixels(tmp_path / "b"))
    assert read_record(next((tmp_path / "b").glob("*.png"))).settings.shift == 1.7


def test_with_local_only_no_hub_is_asked(tmp_path, tiny_autoencoder, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["local_files_only"]))
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    vae = load_autoencoder(str(tiny_autoencoder))
    source = TextEncoderSource("OWNER/ELSEWHERE")
    save_final(tmp_path / "final", network().state_dict(), xut=CONFIG, text_encoder=source, autoencoder=vae)
    with pytest.raises(UserError, match="OWNER/ELSEWHERE") as told:
        load_pipeline(tmp_path, LoadOptions(local_only=True))
    assert told.value.where == "text_encoder" and "hf download OWNER/ELSEWHERE" in told.value.hint
    assert asked == [("OWNER/ELSEWHERE", True)]
    with pytest.raises(UserError, match="does not exist"):
        load_pipeline(Path("OWNER/MODEL"), LoadOptions(local_only=True))
    assert len(asked) == 1


def test_another_text_encoder_s_name_leaves_layer_and_context_length_as_recorded(
    tmp_path, tiny_text_encoder, tiny_autoencoder
):
    recorded = TextEncoderSource("OWNER/NOT-HERE", layer=-2, context_length=16)
    vae = load_autoencoder(str(tiny_autoencoder))
    save_final(tmp_path / "final", network().state_dict(), xut=CONFIG, text_encoder=recorded, autoencoder=vae)
    file, folder, name = tmp_path / "hdm.safetensors", tmp_path / "renamed", str(tiny_text_encoder)
    assert convert.main([str(tmp_path / "final"), str(file)]) == 0
    assert convert.main([str(file), str(folder), "--text-encoder", name]) == 0
    expected = load_text_encoder(name, layer=-2).encode(torch.tensor([[2, 3]]), torch.tensor([2]))
    for path, options in (
        (tmp_path / "final", LoadOptions(text_encoder=name)),
        (file, LoadOptions(text_encoder=name)),
        (folder, LoadOptions()),
    ):
        pipeline = load_pipeline(path, options).pipeline
        assert pipeline.caption_tokenizer.context_length == 16
        torch.testing.assert_close(pipeline.encoder.encode(torch.tensor([[2, 3]]), torch.tensor([2])), expected)


def without(names):
    tensors = released_tensors(torch.float32)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("tensors", "messages"),
    [
        (without(("vae",)), ["contains no autoencoder with its normalization", "--vae"]),
        (without(("vae_std",)), ["contains no autoencoder with its normalization"]),
        (without(("vae.decoder.mid_block",)), ["not those of an AutoencoderKL"]),
        (without(("unet.model.ctx_proj.bias",)), ["missing (1): ctx_proj.bias"]),
        (without(("unet.",)), ["no tensor belongs to an XUT", "unexpected (", "vae.encoder."]),
        (network().state_dict(), ["has weights of this project without their configuration"]),
        ({f"network.{n}": t for n, t in network().state_dict().items()}, ["is a training checkpoint", "final/"]),
    ],
    ids=["no vae", "no statistics", "half a vae", "half a network", "no network", "our weights", "our checkpoint"],
)
def test_what_a_file_lacks_is_told(tmp_path, tiny_text_encoder, capsys, tensors, messages):
    path = tmp_path / "hdm.ckpt"
    torch.save({"state_dict": tensors}, path)
    assert sample.main([str(path), PROMPT, "--text-encoder", str(tiny_text_encoder), "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    for message in (str(path), *messages):
        assert message in told
    assert "Traceback" not in told


def test_a_folder_of_ours_without_an_autoencoder_is_told(tmp_path, tiny_text_encoder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(released_tensors(torch.float32, "", vae=False, text=False), "bare.safetensors")
    assert convert.main(["bare.safetensors", "ours", "--text-encoder", str(tiny_text_encoder)]) == 0
    assert sample.main(["ours", *DRAW]) == 2
    told = capsys.readouterr().err
    assert "ours: contains no autoencoder (vae/)" in told
    assert "hint: name one with --vae" in told


def test_a_run_that_has_not_finished_is_told_as_one(tmp_path, capsys):
    run = tmp_path / "mine"
    run.mkdir()
    for name in ("config.yaml", "ledger.jsonl"):
        (run / name).write_text("")
    for command, arguments in (
        (sample.main, [str(run), PROMPT, "--out", str(tmp_path / "out")]),
        (convert.main, [str(run), str(tmp_path / "converted")]),
    ):
        assert command(arguments) == 2
        assert "has not written its final/ yet" in capsys.readouterr().err
    with pytest.raises(UserError, match="has not written its final/ yet"):
        base_folder(str(run))


def test_a_run_that_trained_an_autoencoder_is_told_as_one(tmp_path, tiny_autoencoder, capsys):
    run = tmp_path / "vae"
    shutil.copytree(tiny_autoencoder, run / "final")
    for name in ("config.yaml", "ledger.jsonl"):
        (run / name).write_text("")
    assert sample.main([str(run), PROMPT, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "trained an autoencoder, not a network" in told
    assert f"vae.name={run / 'final'}" in told


def test_what_is_no_model_is_told(tmp_path, tiny_text_encoder, tiny_autoencoder, capsys):
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "bad.safetensors").write_text("hello")
    for path, message in [
        (tmp_path / "text.txt", "neither a safetensors nor a torch file"),
        (tmp_path / "bad.safetensors", "neither a safetensors nor a torch file"),
        (tmp_path, "contains no trained model"),
        (tiny_autoencoder, "an XUT in it"),
        (tmp_path / "nowhere", "does not exist"),
    ]:
        assert sample.main([str(path), PROMPT, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    released = write_single(tmp_path / "hdm", torch.float32)
    assert sample.main([str(released), PROMPT]) == 2
    assert "hint: name one with --text-encoder" in capsys.readouterr().err


def test_a_run_finds_its_text_encoder_from_elsewhere(tmp_path, tiny_text_encoder, monkeypatch, capsys):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (project / "data").mkdir(parents=True)
    (project / "data" / "words").symlink_to(tiny_text_encoder)
    relative = TextEncoderSource("data/words", context_length=16)
    monkeypatch.chdir(project)
    final = project / "runs" / "toy" / "final"
    save_final(final, network().state_dict(), xut=CONFIG, text_encoder=relative, autoencoder=autoencoder())
    monkeypatch.chdir(elsewhere)
    command = [str(final.parent), *DRAW, "--out"]
    assert sample.main([*command, "a"]) == 0
    written = json.loads((final / "model_index.json").read_text())
    assert written["text_encoder_name"] == str(project / "data" / "words")
    # A folder of before, or one that was copied with what lies around it.
    written["text_encoder_name"] = "data/words"
    (final / "model_index.json").write_text(json.dumps(written))
    assert sample.main([*command, "b"]) == 0
    assert np.array_equal(pixels(elsewhere / "a"), pixels(elsewhere / "b"))
    (project / "data" / "words").unlink()
    assert sample.main([*command, "c"]) == 2
    assert "text_encoder: the model 'data/words' is not on this machine" in capsys.readouterr().err
    assert replace(relative, name="OWNER/NAME").kept().name == "OWNER/NAME"
    assert replace(relative, name="package:json").found_from(final).name == "package:json"
