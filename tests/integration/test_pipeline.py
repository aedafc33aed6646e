"""HDMPipeline as a pipeline of diffusers: its call, its folder, its parts, and what it refuses to load."""

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import Qwen3Model

import hdm_lightning
from hdm_lightning import HDMPipeline, load_autoencoder, load_text_encoder
from hdm_lightning.cli import convert
from hdm_lightning.diffusion import sampling
from hdm_lightning.diffusion.sampling import SOLVERS
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.generation.components import FlowScheduler, XUTTransformer
from hdm_lightning.generation.image_files import to_pil
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings, Solver
from hdm_lightning.interop.pipeline_folder import read_pipeline_folder
from toy_run import CONFIG, shaken_state, write_final

SAMPLING = {"height": 32, "width": 48, "steps": 3, "guidance_scale": 2.0, "solver": "heun", "shift": 1.5}
SETTINGS = SamplingSettings(**SAMPLING)
PROMPTS = ["a red circle", "a large blue star on the left of a small green square"]


@pytest.fixture(scope="module")
def state():
    return shaken_state(by=0.05)


@pytest.fixture(scope="module")
def final(tmp_path_factory, state, tiny_text_encoder, tiny_autoencoder):
    """A run's final/ folder, whose text encoder is found by its path."""
    folder = tmp_path_factory.mktemp("run") / "final"
    training = {"name": "toy", "samples": 7, "stages": [{"name": "px32", "loss": None}]}
    kept = {"raw": True, "training": training, "sampling": SAMPLING}
    return write_final(folder, tiny_text_encoder, tiny_autoencoder, state, layer=-2, **kept)


@pytest.fixture(scope="module")
def expected(final):
    """What is drawn for two prompts with the seeds 5 and 6."""
    return load_pipeline(final, LoadOptions()).pipeline.draw(PROMPTS, [5, 6], SETTINGS)


def in_levels(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def assert_same_images(ours, theirs):
    """Equal but for the rounding of a value that lies between two levels: kernels may choose their order by address."""
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-2


def test_diffusers_loads_what_a_training_leaves_and_draws_the_same(final, expected):
    for folder in (final, final.parent):
        pipeline = HDMPipeline.from_pretrained(folder)
        assert_same_images(pipeline.draw(PROMPTS, [5, 6], SETTINGS), expected)
    assert isinstance(pipeline.transformer, XUTTransformer) and isinstance(pipeline.vae, AutoencoderKL)
    assert isinstance(pipeline.text_encoder, Qwen3Model) and pipeline.text_encoder.config.num_hidden_layers == 1
    assert (pipeline.scheduler.config.solver, pipeline.scheduler.config.shift) == ("heun", 1.5)
    assert pipeline.config.training["samples"] == 7
    images = pipeline(PROMPTS, seed=[5, 6]).images  # with the settings that the folder names
    assert_same_images(in_levels(images), expected)


def test_the_last_weights_are_a_variant(final, state):
    last = HDMPipeline.from_pretrained(final, variant="raw")
    for name, value in last.network.state_dict().items():
        assert torch.equal(value, 0.9 * state[name])
    by_option = load_pipeline(final, LoadOptions(weights="raw")).pipeline
    assert_same_images(last.draw(PROMPTS, [5, 6], SETTINGS), by_option.draw(PROMPTS, [5, 6], SETTINGS))


@pytest.mark.parametrize("included", [None, True, False])
def test_a_pipeline_that_is_saved_again_draws_the_same(final, expected, tmp_path, included):
    """A text encoder from a folder travels along by default, cut to the layer that is used; a hub's does not."""
    folder = tmp_path / "again"
    HDMPipeline.from_pretrained(final).save_pretrained(folder, include_text_encoder=included)
    assert (folder / "text_encoder").is_dir() == (folder / "tokenizer").is_dir() == (included is not False)
    assert "A text-to-image model" in (folder / "README.md").read_text()
    again = HDMPipeline.from_pretrained(folder)
    assert_same_images(again.draw(PROMPTS, [5, 6], SETTINGS), expected)
    assert_same_images(load_pipeline(folder, LoadOptions()).pipeline.draw(PROMPTS, [5, 6], SETTINGS), expected)
    assert again.config.training == {"name": "toy", "samples": 7, "stages": [{"name": "px32", "loss": None}]}
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}
    assert modes == {0o666 & ~umask}


def test_hub_names_are_referred_to(final, tmp_path):
    pipeline = HDMPipeline.from_pretrained(final)
    pipeline.register_to_config(text_encoder_name="OWNER/NAME")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    assert index["text_encoder_name"] == "OWNER/NAME"
    assert not (tmp_path / "text_encoder").exists()
    assert pipeline.components["text_encoder"] is pipeline.text_encoder  # saving leaves the pipeline as it was


@pytest.mark.parametrize("single", [False, True], ids=["a folder", "a single file"])
def test_a_text_encoder_of_ones_own_is_saved_instead_of_the_recorded_name(final, tmp_path, single):
    """The recorded name is a hub's, so that saving would leave the encoder out."""
    recorded = HDMPipeline.from_pretrained(final)
    own, source = recorded.text_encoder, shutil.copytree(final, tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "text_encoder_name": "OWNER/NAME"}))
    if single:
        assert convert.main([str(source), str(tmp_path / "hdm.safetensors")]) == 0
        source = tmp_path / "hdm.safetensors"
    pipeline = HDMPipeline.from_pretrained(source, text_encoder=own, tokenizer=recorded.tokenizer)
    assert pipeline.text_encoder is own and pipeline.config.text_encoder_name is None
    pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "text_encoder" / "config.json").is_file()


def test_a_final_folder_may_hold_its_text_encoder(tmp_path, state, final, expected, tiny_text_encoder):
    words = tmp_path / "words"
    shutil.copytree(tiny_text_encoder, words)
    kept = {"sampling": SAMPLING, "include_text_encoder": True}
    write_final(tmp_path / "final", words, final, state, layer=-2, **kept)
    shutil.rmtree(words)
    for pipeline in (
        HDMPipeline.from_pretrained(tmp_path / "final"),
        load_pipeline(tmp_path / "final", LoadOptions()).pipeline,
    ):
        assert_same_images(pipeline.draw(PROMPTS, [5, 6], SETTINGS), expected)
        bound = pipeline.encoder.tokenizer.bind(16)  # as a ShardDataModule takes it
        assert bound("a red star") == Tokenizer(str(tiny_text_encoder)).bind(16)("a red star")


def test_parts_in_another_s_place_are_told(final):
    pipeline = HDMPipeline.from_pretrained(final)
    with pytest.raises(TypeError, match="scheduler: got TransformersTextEncoder"):
        HDMPipeline(pipeline.network, pipeline.autoencoder, pipeline.encoder)


def test_the_call_is_that_of_diffusers(final, expected):
    pipeline = HDMPipeline.from_pretrained(final)
    pipeline.set_progress_bar_config(disable=True)
    named = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 2.0}
    one = pipeline(PROMPTS[0], **named, negative_prompt="", generator=torch.Generator().manual_seed(5))
    assert isinstance(one.images[0], Image.Image) and one.images[0].size == (48, 32)
    assert_same_images(in_levels(one.images), expected[:1])
    pt = pipeline(PROMPTS, seed=[5, 6], output_type="pt").images
    array = pipeline(PROMPTS, seed=[5, 6], output_type="np", return_dict=False)[0]
    assert pt.shape == (2, 3, 32, 48) and array.shape == (2, 32, 48, 3)
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), pt)
    assert_same_images((pt * 255).round().to(torch.uint8), expected)
    latent = pipeline(PROMPTS, seed=[5, 6], output_type="latent").images
    assert latent.shape == (2, 4, 8, 12)
    torch.testing.assert_close((pipeline.autoencoder.decode(latent) + 1) / 2, pt)
    many = pipeline(PROMPTS[0], seed=5, num_images_per_prompt=2).images
    assert_same_images(in_levels(many)[:1], expected[:1])
    torch.manual_seed(3)
    first = pipeline(PROMPTS[0], output_type="latent").images
    assert not torch.equal(pipeline(PROMPTS[0], output_type="latent").images, first)
    torch.manual_seed(3)
    torch.testing.assert_close(pipeline(PROMPTS[0], output_type="latent").images, first)


def test_a_callback_sees_the_latents_and_may_change_them(final):
    pipeline, seen = HDMPipeline.from_pretrained(final), []

    def look(pipe, step, time, tensors):
        assert pipe is pipeline
        seen.append((step, time, tensors["latents"]))
        return tensors

    plain = pipeline(PROMPTS, seed=5, output_type="latent", callback_on_step_end=look).images
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [time for _, time, _ in seen] == pytest.approx(FlowScheduler("heun", 1.5).grid(3).tolist()[:3])
    assert torch.equal(seen[-1][2], plain) and plain.dtype == torch.float32
    assert torch.equal(pipeline(PROMPTS, seed=5, output_type="latent").images, plain)  # looking changes nothing

    def zero_at_the_end(pipe, step, time, tensors):
        return {"latents": 0 * tensors["latents"]} if step == 2 else None

    changed = pipeline(PROMPTS, seed=5, output_type="latent", callback_on_step_end=zero_at_the_end).images
    assert not changed.any()

    def zero_in_place(pipe, step, time, tensors):
        tensors["latents"].mul_(float(step != 2))
        return tensors

    changed = pipeline(PROMPTS, seed=5, output_type="latent", callback_on_step_end=zero_in_place).images
    assert not changed.any()


def test_times_are_numbers_of_float32_unless_two_would_be_one():
    grid = FlowScheduler(shift=1.7).grid(9)
    assert grid.dtype == torch.float64 and torch.equal(grid, sampling.shifted_grid(9, 1.7).float().double())
    assert torch.equal(FlowScheduler(shift=1e6).grid(200), sampling.shifted_grid(200, 1e6))


def test_the_camera_routing_and_a_start_image_are_arguments_of_the_call(final):
    pipeline = HDMPipeline.from_pretrained(final)
    given = {"x_shift": 0.25, "zoom": 1.5, "routing_scale": 1.5, "weak_rate": 0.6, "guidance_interval": (0.1, 0.9)}
    settings = dataclasses.replace(SETTINGS, **given, strength=0.5)
    image = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = pipeline.draw(PROMPTS[:1], [3], settings, images=image)
    for start in (image, to_pil(image[0])):
        drawn = pipeline(PROMPTS[0], seed=3, image=start, strength=0.5, **given).images
        assert_same_images(in_levels(drawn), expected)
    alone = pipeline(PROMPTS[0], seed=3, image=Image.new("RGB", (16, 24)), strength=0.5).images[0]
    assert alone.size == (16, 24)  # the size of the image, where none is asked for


def test_a_start_image_gives_its_size_as_it_is_seen_whether_picture_or_tensor(final):
    """The tensor is the picture as Pillow itself turns it."""
    pipeline = HDMPipeline.from_pretrained(final)
    picture = Image.effect_noise((24, 16), 80).convert("RGB")
    picture.getexif()[0x0112] = 6  # turned by a quarter: seen, it is 16 wide and 24 high
    picture.info["exif"] = picture.getexif().tobytes()
    seen = in_levels([ImageOps.exif_transpose(picture)])
    assert seen.shape == (1, 3, 24, 16)
    drawn = [pipeline(PROMPTS[0], seed=3, image=start, strength=0.3).images for start in (picture, seen)]
    assert drawn[0][0].size == drawn[1][0].size == (16, 24)
    assert_same_images(in_levels(drawn[0]), in_levels(drawn[1]))
    larger = pipeline(PROMPTS[0], seed=3, image=picture, strength=0.3, height=48, width=32).images[0]
    assert larger.size == (32, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 30}, "height: got 30, expected a multiple of 4"),
        ({"stepz": 3}, r"unknown sampling settings \['stepz'\]"),
        ({"output_type": "jpeg"}, "output_type: got 'jpeg'"),
        ({"seed": [1, 2, 3]}, "seeds: got 3 for 2 prompts"),
        ({"seed": -1}, "seeds: got"),
        ({"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "height": 16}, "images: got"),
        ({"image": torch.zeros(8, dtype=torch.uint8)}, "images: got"),
    ],
)
def test_what_cannot_be_drawn_is_named(final, arguments, message):
    with pytest.raises(ValueError, match=message):
        HDMPipeline.from_pretrained(final)(PROMPTS, **arguments)


def test_parts_of_ones_own_take_the_places_of_the_folder_s(final, tiny_autoencoder):
    vae = AutoencoderKL.from_pretrained(str(tiny_autoencoder), low_cpu_mem_usage=False)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[3.0] * 4)
    pipeline = HDMPipeline.from_pretrained(final, vae=vae, scheduler=FlowScheduler("euler"))
    assert pipeline.vae is vae and pipeline.sampling_defaults["solver"] == "euler"
    latent = torch.randn(1, 4, 8, 8)
    own = (3.0 * latent, vae.decode(3.0 * latent).sample.clamp(-1, 1))
    torch.testing.assert_close(pipeline.autoencoder.decode(latent), own[1])
    other = AutoencoderKL.from_pretrained(str(tiny_autoencoder), low_cpu_mem_usage=False)
    pipeline.vae = other
    assert pipeline.autoencoder.model is other


def test_lower_precision_and_tiles_are_diffusers_own(final, expected):
    half = HDMPipeline.from_pretrained(final, torch_dtype=torch.bfloat16)
    dtypes = {part.dtype for part in (half.transformer, half.vae, half.text_encoder)}
    assert dtypes == {torch.bfloat16} and half.dtype == torch.bfloat16
    difference = (half.draw(PROMPTS, [5, 6], SETTINGS).float() - expected.float()).abs().mean()
    assert 0 < difference < 8
    tiled = HDMPipeline.from_pretrained(final)
    tiled.enable_vae_tiling()
    tiled.vae.tile_sample_min_size, tiled.vae.tile_latent_min_size = 16, 4
    drawn = tiled.draw(PROMPTS, [5, 6], SETTINGS)
    assert drawn.shape == expected.shape and not torch.equal(drawn, expected)


def test_parts_of_a_training_stand_in_the_places_of_diffusers(final, expected, tiny_text_encoder):
    """A network of one's own, and encoders with caches; its weights are read at each call."""

    class Own:
        config = CONFIG

        def __init__(self, network):
            self.network = network

        def parameters(self):
            return self.network.parameters()

        def __call__(self, *arguments, **named):
            return self.network(*arguments, **named)

    network = read_pipeline_folder(final).load_network()
    text = load_text_encoder(str(tiny_text_encoder), layer=-2, cache_size=4)
    vae = load_autoencoder(str(final), cache_size=4)
    pipeline = HDMPipeline(Own(network), vae, text_encoder=text, context_length=16)
    assert pipeline.network.network is network and pipeline.encoder is text and pipeline.autoencoder is vae
    assert_same_images(pipeline.draw(PROMPTS, [5, 6], SETTINGS), expected)
    with torch.no_grad():
        network.output_projection.weight.zero_()
    assert not torch.equal(pipeline.draw(PROMPTS, [5, 6], SETTINGS), expected)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "text_encoder"])
def test_a_folder_names_no_classes_but_known_ones(final, tmp_path, part):
    folder = tmp_path / "final"
    shutil.copytree(final, folder)
    (folder / part).mkdir(exist_ok=True)
    (folder / part / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: ["evil", "Evil"]}))
    with pytest.raises(UserError, match=rf"names \['evil', 'Evil'\] as {part}"):
        HDMPipeline.from_pretrained(folder, trust_remote_code=True)
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["evil", "Evil"]}))
    with pytest.raises(UserError, match="does not describe an HDMPipeline"):
        HDMPipeline.from_pretrained(folder)


def test_folders_that_are_not_there_or_are_not_whole_are_told(final, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no folder 'runs/toy'"):
        HDMPipeline.from_pretrained("runs/toy")
    shutil.copytree(final, "half")
    shutil.rmtree("half/vae")
    with pytest.raises(UserError, match=r"lacks vae/\*"):
        HDMPipeline.from_pretrained("half")
    os.remove("half/model_index.json")  # as while it is being written
    with pytest.raises(UserError, match=r"is incomplete: model_index\.json"):
        load_pipeline(tmp_path / "half", LoadOptions())


def test_offloading_needs_accelerate_and_says_so(final, monkeypatch):
    from hdm_lightning.generation import stored_pipeline as storage

    monkeypatch.setattr(storage, "is_accelerate_available", lambda: False)
    pipeline = HDMPipeline.from_pretrained(final)
    for offload in (pipeline.enable_model_cpu_offload, pipeline.enable_sequential_cpu_offload):
        with pytest.raises(UserError, match=r"needs the package accelerate\n  hint: pip install 'hdm-lightning\[off"):
            offload()


def test_the_folder_is_the_one_that_diffusers_writes(final, tmp_path):
    """Two writers, one layout: configurations and tensors agree."""
    HDMPipeline.from_pretrained(final).save_pretrained(tmp_path, include_text_encoder=False)
    for file in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (final, tmp_path))
        theirs.pop("_name_or_path", None)
        assert ours == theirs
    name = "transformer/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(folder / name) for folder in (final, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_layout_of_before_is_read(final, expected, state, tmp_path):
    """config.json beside model.safetensors and model_raw.safetensors, as runs before this layout have it."""
    from safetensors.torch import save_file

    shutil.copytree(final / "vae", tmp_path / "final" / "vae")
    text = dataclasses.asdict(read_pipeline_folder(final).text_encoder)
    description = {"format": "hdm-lightning model 1", "xut": CONFIG.to_json(), "text_encoder": text}
    description |= {"latent": {"channels": 4, "factor": 4}, "training": {"samples": 7}, "sampling": SAMPLING}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "final" / "model.safetensors")
    (tmp_path / "final" / "config.json").write_text(json.dumps(description))
    for path in (tmp_path, tmp_path / "final", tmp_path / "final" / "model.safetensors"):
        loaded = load_pipeline(path, LoadOptions())
        assert_same_images(loaded.pipeline.draw(PROMPTS, [5, 6], SETTINGS), expected)
        assert loaded.sampling == SAMPLING
    with pytest.raises(UserError, match="hdm-convert"):
        HDMPipeline.from_pretrained(tmp_path)


def test_solvers_and_public_names_are_one_list():
    assert set(get_args(Solver)) == set(SOLVERS)
    assert hdm_lightning.HDMPipeline is HDMPipeline


def test_our_card_goes_to_the_hub_and_no_template(final, monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, *arguments, **options):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

    def upload(folder_path, **options):
        uploaded.update({path.name: path.read_text() for path in Path(folder_path).glob("*.*") if path.is_file()})

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", Hub().create_repo)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    template = ModelCard("---\nlicense: other\n---\n# a template")
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *args, **kwargs: template)
    HDMPipeline.from_pretrained(final).push_to_hub("owner/name", token="none")
    assert "template" not in uploaded["README.md"]
    assert str(CONFIG.width) in uploaded["README.md"] and "toy" in uploaded["README.md"]
    assert "model_index.json" in uploaded
