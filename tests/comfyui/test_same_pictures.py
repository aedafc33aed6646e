"""What ComfyUI draws with this project's nodes, beside what hdm-sample draws of the same model, seed and settings."""

import numpy as np
import pytest
from PIL import Image

import four_ways
from drawing_workflow import SEED, by_solver, drawing, node, with_camera, with_model
from hdm_lightning.cli import convert, sample
from hdm_lightning.models import PUBLISHED

pytestmark = pytest.mark.comfyui

LEAST_CHANGE = 0.02
"""Share of values that a setting must change, or the test of it would see nothing."""


@pytest.fixture
def in_comfyui(comfyui):
    """Function of a workflow that gives the levels (H, W, 3) of the picture that it saves."""

    def draw(graph):
        (picture,) = comfyui.pictures(comfyui.run(graph))
        return levels(picture)

    return draw


@pytest.fixture
def by_command(tmp_path, run):
    """Function of hdm-sample's options that gives the levels of the picture it draws of the run."""

    def draw(*options, model=run, prompt="a red circle"):
        out = tmp_path / "drawn"
        given = ["--steps", "10", "--solver", "euler", "--seed", str(SEED), "--out", str(out), *map(str, options)]
        assert sample.main([str(model), prompt, *given]) == 0
        return levels(max(out.glob("*.png"), key=lambda path: path.stat().st_mtime_ns))

    return draw


def levels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def assert_same(found, expected):
    """Equal but for one value in five hundred, which lies between two levels."""
    assert found.shape == expected.shape
    apart = abs(found - expected)
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.002, (apart.max(), (apart > 0).mean())


def differ(one, other):
    return (one != other).mean() > LEAST_CHANGE


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 56)])
def test_ksampler_draws_as_hdm_sample(in_comfyui, by_command, cfg, width, height):
    expected = by_command("--guidance", cfg, "--size", f"{width}x{height}")
    assert_same(in_comfyui(drawing("run", cfg=cfg, width=width, height=height)), expected)


def test_python_command_and_nodes_draw_the_same(comfyui, run, tmp_path):
    """With the solver of this project; the page's test compares it with the command in the same way."""
    asked = (run / "final", "a red circle", 96, 56)
    by_hand = four_ways.by_command(*asked, tmp_path)
    assert np.array_equal(four_ways.by_pipeline(*asked), by_hand)
    assert_same(four_ways.by_nodes(comfyui, *asked).astype(int), by_hand.astype(int))


@pytest.mark.parametrize("negative", ["", "dark", "a small green square on the right of a dark circle"])
def test_texts_of_other_lengths_are_padded_and_not_repeated(in_comfyui, by_command, negative):
    prompt = "a large blue star on the left of light"
    expected = by_command("--negative-prompt", negative, prompt=prompt)
    assert_same(in_comfyui(drawing("run", prompt=prompt, negative=negative)), expected)
    assert differ(expected, by_command("--guidance", 1, prompt=prompt))


def test_a_single_file_of_the_own_wiring_draws_the_same(in_comfyui, by_command, single):
    assert_same(in_comfyui(drawing("single.safetensors")), by_command())
    assert_same(by_command(model=single), by_command())


def test_the_published_layout_is_read_too(in_comfyui, by_command, saved, comfyui, tmp_path):
    released = saved(tmp_path / "released", **PUBLISHED)
    file = comfyui.folder / "models" / "checkpoints" / "released.safetensors"
    file.parent.mkdir(exist_ok=True)
    assert convert.main([str(released), str(file), "--to", "published"]) == 0
    assert_same(in_comfyui(drawing("released.safetensors")), by_command(model=released))


@pytest.mark.parametrize(("solver", "steps", "shift"), [("ab2", 7, 0.0), ("heun", 6, 2.5), ("ab3", 9, 0.7)])
def test_solvers_and_times_are_hdm_sample_s(in_comfyui, by_command, solver, steps, shift):
    options = ("--solver", solver, "--steps", steps, *(("--shift", shift) if shift else ()))
    assert_same(in_comfyui(by_solver(drawing("run"), solver, steps, shift)), by_command(*options))


def test_the_camera_moves_and_leaves_no_trace(in_comfyui, by_command):
    moved = by_command("--x-shift", 0.4, "--y-shift", -0.3, "--zoom", 1.6)
    still = by_command()
    assert differ(moved, still)
    assert_same(in_comfyui(with_camera(drawing("run"), 0.4, -0.3, 1.6)), moved)
    assert_same(in_comfyui(drawing("run")), still)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_routing_guidance_routes_the_tokens_that_hdm_sample_routes(in_comfyui, by_command, cfg):
    expected = by_command("--guidance", cfg, "--routing-guidance", 1.8, "--weak-rate", 0.4)
    guide = node("HDMRoutingGuidance", model=["model", 0], scale=1.8, weak_rate=0.4)
    graph = with_model(drawing("run", cfg=cfg), guide)
    for _ in range(2):  # the second time anew, not where the first one has left off
        assert_same(in_comfyui(graph), expected)
        graph["saved"]["inputs"]["filename_prefix"] = "again"
        graph["sampler"]["inputs"]["seed"] = SEED
    assert differ(expected, by_command("--guidance", cfg))


@pytest.mark.parametrize("loader", ["HDMLoadLora ink", "HDMLoadLora ink.safetensors", "LoraLoaderModelOnly"])
def test_a_lora_draws_as_with_hdm_sample(in_comfyui, by_command, run, lora, tmp_path, loader):
    """In the weights, as ComfyUI has it, and but for their rounding as beside them."""
    assert convert.main([str(run), str(tmp_path / "merged"), "--lora", f"{lora}:0.7"]) == 0
    merged, beside = by_command(model=tmp_path / "merged"), by_command("--lora", f"{lora}:0.7")
    if loader == "LoraLoaderModelOnly":  # ComfyUI's own, by the names of lora_comfyui
        changed = node(loader, model=["model", 0], lora_name="ink.safetensors", strength_model=0.7)
    else:
        changed = node("HDMLoadLora", model=["model", 0], name=loader.split()[1], weight=0.7)
    found = in_comfyui(with_model(drawing("run"), changed))
    assert_same(found, merged)
    assert abs(found - beside).max() <= 1
    assert differ(merged, by_command())


def test_an_image_to_start_from_is_encoded_and_mixed_alike(in_comfyui, by_command, comfyui):
    pixels = np.random.default_rng(0).integers(0, 255, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(comfyui.folder / "input" / "start.png")
    graph = by_solver(drawing("run", latent_image=["encoded", 0]), "euler", 10, strength=0.5)
    graph |= {
        "start": node("LoadImage", image="start.png"),
        "encoded": node("VAEEncode", pixels=["start", 0], vae=["model", 2]),
    }
    expected = by_command("--image", comfyui.folder / "input" / "start.png", "--strength", 0.5)
    assert_same(in_comfyui(graph), expected)
    assert differ(expected, by_command())


def test_without_rounding_comfyui_cuts_fractions_off(in_comfyui, by_command):
    graph = drawing("run")
    graph["saved"]["inputs"]["images"] = ["decoded", 0]
    apart = by_command() - in_comfyui(graph)
    assert set(np.unique(apart)) == {0, 1} and 0.3 < (apart == 1).mean() < 0.7


def test_tiles_and_batches_work(in_comfyui, comfyui):
    graph = drawing("run", width=256, height=256, steps=2)
    whole = in_comfyui(graph)
    tiled = node("VAEDecodeTiled", samples=["sampler", 0], vae=["model", 2], tile_size=128, overlap=32)
    tiled["inputs"] |= {"temporal_size": 64, "temporal_overlap": 8}
    in_tiles = in_comfyui({**graph, "decoded": tiled})
    assert in_tiles.shape == whole.shape and np.corrcoef(in_tiles.ravel(), whole.ravel())[0, 1] > 0.97
    assert differ(in_tiles, whole)
    several = drawing("run")
    several["latent"]["inputs"]["batch_size"] = 3
    pictures = [levels(path) for path in comfyui.pictures(comfyui.run(several))]
    assert len(pictures) == 3 and differ(pictures[0], pictures[1])
    assert_same(pictures[0], in_comfyui(drawing("run")))
