"""Drawing: pictures that depend on prompt, seed and settings alone; camera, routing, image-to-image, bundles."""

import copy
import dataclasses
import itertools
import json
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from hdm_lightning.diffusion import flow, sampling
from hdm_lightning.diffusion.guidance import one_by_one
from hdm_lightning.encoders.autoencoder import KLAutoencoder, load_autoencoder
from hdm_lightning.encoders.pretrained import TextEncoderSource
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.errors import UserError
from hdm_lightning.generation import pipeline as pipeline_module
from hdm_lightning.generation.guided_branches import velocities
from hdm_lightning.generation.image_files import image_size, read_image, to_uint8
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.generation.stored_pipeline import save_final
from hdm_lightning.interop import published
from hdm_lightning.interop.pipeline_folder import read_pipeline_folder
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from hdm_lightning.models.positions import token_positions
from toy_run import CONFIG

PROMPTS = ["a red circle", "a large blue star on the left of a small green square", "", "a dark drawing"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SETTINGS = SamplingSettings(height=32, width=48, steps=4, guidance_scale=2.0)


def filled_xut(config: XUTConfig) -> XUT:
    """A network none of whose outputs is zero."""
    torch.manual_seed(0)
    model = XUT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def pipeline(tiny_text_encoder, tiny_autoencoder):
    made = HDMPipeline(
        filled_xut(CONFIG),
        load_autoencoder(str(tiny_autoencoder)),
        text_encoder=load_text_encoder(str(tiny_text_encoder)),
        context_length=16,
    )
    made.max_batch = 4
    return made


def assert_same_pictures(ours, theirs):
    """Equal but for the rounding of a value that lies between two levels."""
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("changes", [{}, {"conditional_rate": 0.25, "routing_scale": 1.5}], ids=["dense", "routed"])
def test_a_picture_does_not_depend_on_its_batch(pipeline, changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    seeds = [5, 6, 7, 8]
    together = pipeline.draw(PROMPTS, seeds, settings)
    assert together.shape == (4, 3, 32, 48)
    assert together.dtype == torch.uint8
    for row, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        assert_same_pictures(pipeline.draw([prompt], [seed], settings)[0], together[row])
    pipeline.max_batch = 3
    assert_same_pictures(pipeline.draw(PROMPTS, seeds, settings), together)
    pipeline.max_batch = 4


def test_prompt_seed_and_settings_all_matter(pipeline):
    base = pipeline.draw(PROMPTS[:1], [5], SETTINGS)
    assert torch.equal(base, pipeline.draw(PROMPTS[:1], [5], SETTINGS))
    variants = [
        pipeline.draw(PROMPTS[1:2], [5], SETTINGS),
        pipeline.draw(PROMPTS[:1], [6], SETTINGS),
        *(
            pipeline.draw(PROMPTS[:1], [5], dataclasses.replace(SETTINGS, **change))
            for change in (
                {"steps": 5},
                {"solver": "heun"},
                {"shift": 3.0},
                {"guidance_scale": 4.0},
                {"guidance_interval": (0.0, 0.6)},
                {"negative_prompt": "a green square"},
                {"routing_scale": 1.5},
                {"conditional_rate": 0.5},
                {"unconditional_rate": 0.5},
                {"x_shift": 0.5},
                {"y_shift": 0.5},
                {"zoom": 1.5},
            )
        ),
    ]
    for variant in variants:
        assert (variant.int() - base.int()).abs().max() >= 1


def test_the_pipeline_is_the_formula(pipeline):
    """Euler with guidance, written out for one picture of a prompt."""
    settings = dataclasses.replace(SETTINGS, solver="euler", shift=2.0)
    x = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(9))[None]

    def predicted(text, t):
        ids, count = pipeline.caption_tokenizer(text)
        context = pipeline.encoder.encode(torch.tensor([ids]), torch.tensor([count]))[:, :count]
        return pipeline.transformer(x, torch.tensor([t]), context)

    grid = sampling.shifted_grid(4, 2.0).tolist()
    with torch.no_grad():
        for now, then in itertools.pairwise(grid):
            conditional, unconditional = predicted(PROMPTS[0], now), predicted("", now)
            x = x + (then - now) * (unconditional + 2.0 * (conditional - unconditional))
    expected = to_uint8(pipeline.autoencoder.decode(x))
    assert_same_pictures(pipeline.draw(PROMPTS[:1], [9], settings), expected)


def test_the_way_by_the_clean_image_draws_the_same(pipeline):
    """As samplers of other programs go: the solver computes in float64, and only what the network gets is rounded."""
    settings = dataclasses.replace(SETTINGS, solver="euler", shift=1.7, guidance_scale=1.0)
    context, positions = pipeline._encode(PROMPTS[:1]).context, pipeline._positions((8, 12), settings)
    x = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(9))[None].double()
    with torch.no_grad():
        for now, then in itertools.pairwise(sampling.shifted_grid(4, 1.7).float().tolist()):
            v = pipeline.transformer(x.float(), torch.tensor([now]), context, token_positions=positions)
            clean = x - now * v.double()
            x = x + (then - now) * ((x - clean) / now)
    named = {"solver": "euler", "shift": 1.7, "guidance_scale": 1.0, "num_inference_steps": 4}
    latent = pipeline(PROMPTS[0], 32, 48, seed=9, output_type="latent", **named).images
    assert latent.dtype == torch.float32 and torch.equal(latent, x.float())
    assert torch.equal(pipeline.draw(PROMPTS[:1], [9], settings), to_uint8(pipeline.autoencoder.decode(latent)))


def test_each_branch_has_its_own_rate(pipeline):
    """Both kinds of guidance, each of three branches with another share of tokens, written out for one picture."""
    rates = {"conditional_rate": 0.125, "unconditional_rate": 0.25, "weak_rate": 0.5}
    settings = dataclasses.replace(SETTINGS, solver="euler", steps=2, guidance_scale=2.5, routing_scale=1.75, **rates)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(4, 8, 12, generator=generator)[None]

    def predicted(text, t, rate):
        ids, count = pipeline.caption_tokenizer(text)
        context = pipeline.encoder.encode(torch.tensor([ids]), torch.tensor([count]))[:, :count]
        scores = torch.rand(96, generator=generator)
        keep = scores.argsort(descending=True)[: 96 - int(rate * 96)].sort().values[None]
        return pipeline.transformer(x, torch.tensor([t]), context, keep=keep)

    with torch.no_grad():
        for t in (1.0, 0.5):
            strong, without, weak = (
                predicted(PROMPTS[0], t, 0.125),
                predicted("", t, 0.25),
                predicted(PROMPTS[0], t, 0.5),
            )
            x = x - 0.5 * (strong + 1.5 * (strong - without) + 0.75 * (strong - weak))
    assert_same_pictures(pipeline.draw(PROMPTS[:1], [9], settings), to_uint8(pipeline.autoencoder.decode(x)))


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, {2: 4}),
        ({"guidance_interval": (0.0, 0.5)}, {1: 2, 2: 2}),
        ({"conditional_rate": 0.25, "unconditional_rate": 0.25}, {2: 4}),
        ({"unconditional_rate": 0.5}, {1: 8}),
        ({"routing_scale": 1.5, "weak_rate": 0.5, "unconditional_rate": 0.5}, {1: 4, 2: 4}),
        ({"negative_prompt": "a green square"}, {2: 4}),
    ],
    ids=["dense", "interval", "routed", "different rates", "routing guidance", "negative prompt"],
)
def test_branches_of_one_rate_go_through_the_network_together(pipeline, monkeypatch, changes, passes):
    """In float64, where nothing but an error could make a millionth of a difference."""
    settings = dataclasses.replace(SETTINGS, solver="euler", **changes)
    model, widths = pipeline.transformer.double(), []
    monkeypatch.setattr(pipeline.encoder, "model", copy.deepcopy(pipeline.text_encoder).double())
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda latent: latent)
    monkeypatch.setattr(pipeline_module, "to_uint8", lambda latent: latent)
    handle = model.register_forward_pre_hook(lambda _module, arguments: widths.append(len(arguments[0]) // 2))
    drawn = []
    try:
        for evaluate in (velocities, one_by_one):
            monkeypatch.setattr(pipeline_module, "velocities", evaluate)
            drawn.append(pipeline.draw(PROMPTS[:2], [5, 6], settings))
    finally:
        handle.remove()
        model.float()
    together, apart = drawn
    assert (together - apart).norm() < 1e-6 * apart.norm()
    counts = Counter(widths)
    separate = sum(size * number for size, number in passes.items())
    assert counts == Counter(passes) + Counter({1: separate})


def test_sizes_that_do_not_fit_are_drawn_larger_and_cut(pipeline):
    settings = dataclasses.replace(SETTINGS, height=30, width=45, on_indivisible="pad")
    whole = pipeline.draw(PROMPTS[:1], [3], dataclasses.replace(SETTINGS, height=32, width=48))
    assert torch.equal(pipeline.draw(PROMPTS[:1], [3], settings), whole[..., :30, :45])
    image = torch.randint(0, 256, (1, 3, 30, 45), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = pipeline.draw(PROMPTS[:1], [3], dataclasses.replace(settings, strength=1e-4), images=image)
    mirrored = torch.cat((image, image[:, :, [28, 27]]), dim=2)
    mirrored = torch.cat((mirrored, mirrored[..., [43, 42, 41]]), dim=3)
    seen = pipeline.autoencoder.decode(pipeline.autoencoder.encode(mirrored / 127.5 - 1.0))
    assert (kept.int() - to_uint8(seen)[..., :30, :45].int()).abs().max() <= 2


def test_image_to_image_starts_from_the_mixture(pipeline, monkeypatch):
    starts = []
    monkeypatch.setitem(sampling.SOLVERS, "euler", lambda velocity, x, grid, on_step: starts.append((x, grid)) or x)
    image = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = dataclasses.replace(SETTINGS, solver="euler", strength=0.6)
    pipeline.draw(PROMPTS[:1], [3], settings, images=image)
    (x, grid), noise = starts[0], torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(3))[None]
    latent = pipeline.autoencoder.encode(image / 127.5 - 1.0)
    torch.testing.assert_close(x, flow.interpolate(latent.double(), noise.double(), torch.tensor([0.6])))
    assert float(grid[0]) == pytest.approx(0.6)
    assert len(grid) == 5


def test_the_picture_to_start_from_is_read_as_training_reads_it(tmp_path):
    sketch = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
    sketch.paste((200, 30, 40, 255), (0, 0, 24, 32))
    sketch.save(tmp_path / "sketch.png")
    read = read_image(tmp_path / "sketch.png", SETTINGS)
    assert read.shape == (1, 3, 32, 48)
    assert read[0, :, 5, 5].tolist() == [200, 30, 40]
    assert read[0, :, 5, 40].tolist() == [255, 255, 255]
    turned = Image.new("RGB", (32, 48), (10, 20, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == (48, 32)
    whole = (tmp_path / "sketch.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(UserError, match=r"cut\.png: cannot be read as an image"):
        read_image(tmp_path / "cut.png", SETTINGS)


def test_little_strength_keeps_the_image(pipeline):
    image = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = to_uint8(pipeline.autoencoder.decode(pipeline.autoencoder.encode(image / 127.5 - 1.0)))
    drawn = [
        pipeline.draw(PROMPTS[:1], [3], dataclasses.replace(SETTINGS, strength=s), images=image)
        for s in (1e-4, 0.5, 1.0)
    ]
    distances = [float((one.float() - kept.float()).abs().mean()) for one in drawn]
    assert distances[0] < 0.2
    assert distances[0] < distances[1] < distances[2]


def test_the_camera_moves_right_down_and_in(pipeline):
    still = pipeline._positions((8, 12), SETTINGS)[0].reshape(8, 12, 2)
    torch.testing.assert_close(still.flatten(0, 1)[None], token_positions(8, 12, convention="area"))
    right = pipeline._positions((8, 12), dataclasses.replace(SETTINGS, x_shift=0.5))[0].reshape(8, 12, 2)
    torch.testing.assert_close(right[..., 1], still[..., 1] + 0.5)
    torch.testing.assert_close(right[..., 0], still[..., 0])
    step = float(still[0, 1, 1] - still[0, 0, 1])
    by_one = pipeline._positions((8, 12), dataclasses.replace(SETTINGS, x_shift=step))[0].reshape(8, 12, 2)
    torch.testing.assert_close(by_one[:, :-1], still[:, 1:])  # the view's left edge shows what was one column right
    down = pipeline._positions((8, 12), dataclasses.replace(SETTINGS, y_shift=0.25))[0].reshape(8, 12, 2)
    torch.testing.assert_close(down[..., 0], still[..., 0] + 0.25)
    closer = pipeline._positions((8, 12), dataclasses.replace(SETTINGS, zoom=2.0))[0].reshape(8, 12, 2)
    torch.testing.assert_close(closer, still / 2)


def test_progress_counts_steps_of_all_batches(pipeline):
    seen = []
    pipeline.max_batch = 2
    pipeline.draw(PROMPTS, [1, 2, 3, 4], SETTINGS, progress=lambda *step: seen.append(step))
    pipeline.max_batch = 4
    assert seen == [(step, 8) for step in range(1, 9)]


def test_what_does_not_fit_is_named(pipeline, tiny_text_encoder, tiny_autoencoder):
    with pytest.raises(ValueError, match="height: got 30, expected a multiple of 4"):
        pipeline.draw(PROMPTS[:1], [0], dataclasses.replace(SETTINGS, height=30))
    with pytest.raises(ValueError, match="seeds: got 2 for 1 prompts"):
        pipeline.draw(PROMPTS[:1], [0, 1], SETTINGS)
    with pytest.raises(ValueError, match="images"):
        pipeline.draw(PROMPTS[:1], [0], SETTINGS, images=torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="16 context dimensions, but the network expects 24"):
        pipeline.with_network(XUT(dataclasses.replace(CONFIG, context_width=24)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "magic"}, "solver: got 'magic', expected one of euler, heun"),
        ({"steps": 0}, "steps"),
        ({"zoom": 0.0}, "zoom"),
        ({"zoom": float("inf")}, "zoom: got inf, expected a number of at most"),
        ({"shift": float("inf")}, "shift: got inf"),
        ({"x_shift": float("nan")}, "x_shift: got nan"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan"),
        ({"strength": 1.5}, "strength"),
        ({"conditional_rate": 1.0}, "conditional_rate"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"routing_scale": 2.0, "weak_rate": 0.0}, "weak_rate"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**change)


def test_settings_survive_json():
    settings = dataclasses.replace(SETTINGS, guidance_interval=(0.1, 0.9), zoom=1.5)
    assert SamplingSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(ValueError, match=r"unknown sampling settings \['stepz'\]"):
        SamplingSettings.from_json({"stepz": 3})


def test_a_bundle_draws_what_was_saved(tmp_path, pipeline, tiny_text_encoder):
    raw = {name: value + 0.01 for name, value in pipeline.network.state_dict().items()}
    save_final(
        tmp_path / "final",
        pipeline.network.state_dict(),
        xut=CONFIG,
        text_encoder=TextEncoderSource(str(tiny_text_encoder), context_length=16),
        autoencoder=pipeline.autoencoder,
        raw_state=raw,
        training={"samples": 7},
        sampling={"steps": 3},
    )
    folder = read_pipeline_folder(tmp_path / "final")
    assert (folder.xut, folder.training) == (CONFIG, {"samples": 7})
    assert folder.sampling == {"steps": 3, "solver": "ab2", "shift": 1.0}
    assert "hdm-sample" in (tmp_path / "final" / "README.md").read_text()
    expected = pipeline.draw(PROMPTS, [1, 2, 3, 4], SETTINGS)
    for path in (tmp_path, tmp_path / "final", tmp_path / "final" / WEIGHTS):
        loaded = load_pipeline(path, LoadOptions(max_batch=4))
        assert torch.equal(loaded.pipeline.draw(PROMPTS, [1, 2, 3, 4], SETTINGS), expected)
    last = load_pipeline(tmp_path, LoadOptions(weights="raw"))
    for name, value in last.pipeline.network.state_dict().items():
        assert torch.equal(value, raw[name])


def test_broken_bundles_are_told(tmp_path, pipeline, tiny_text_encoder):
    with pytest.raises(UserError, match="does not exist"):
        load_pipeline(tmp_path / "nowhere", LoadOptions())
    with pytest.raises(UserError, match="contains no trained model"):
        load_pipeline(tmp_path, LoadOptions())
    save_final(
        tmp_path,
        pipeline.network.state_dict(),
        xut=CONFIG,
        text_encoder=TextEncoderSource(str(tiny_text_encoder)),
        autoencoder=pipeline.autoencoder,
    )
    with pytest.raises(UserError, match=r"there is no diffusion_pytorch_model\.raw"):
        load_pipeline(tmp_path, LoadOptions(weights="raw"))
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: is not a complete safetensors file"):
        load_pipeline(tmp_path, LoadOptions())
    (tmp_path / WEIGHTS).write_bytes(whole)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["network.text_projection.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"mis-shaped \(1\): text_projection.bias \(3,\) instead of \(32,\)"):
        load_pipeline(tmp_path, LoadOptions())


def test_a_published_single_file_draws_like_its_parts(tmp_path, pipeline, tiny_text_encoder):
    torch.manual_seed(1)
    model = filled_xut(dataclasses.replace(CONFIG, patch_size=2, **PUBLISHED))
    vae = KLAutoencoder(
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[32, 32],
        ),
        [0.1, 0.2, 0.3, 0.4],
        [0.5, 0.6, 0.7, 0.8],
    )
    tensors = {f"unet.model.{name}": value for name, value in published.export_state_dict(model).items()}
    tensors |= {f"vae.{name}": value for name, value in vae.model.state_dict().items()}
    tensors |= {"vae_mean": vae.mean, "vae_std": vae.std}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "hdm.safetensors")
    loaded = load_pipeline(tmp_path / "hdm.safetensors", LoadOptions(text_encoder=str(tiny_text_encoder)))
    expected = HDMPipeline(model, vae, text_encoder=pipeline.encoder, context_length=512)
    assert_same_pictures(
        loaded.pipeline.draw(PROMPTS, [1, 2, 3, 4], SETTINGS), expected.draw(PROMPTS, [1, 2, 3, 4], SETTINGS)
    )
    with pytest.raises(UserError, match="--text-encoder"):
        load_pipeline(tmp_path / "hdm.safetensors", LoadOptions())
