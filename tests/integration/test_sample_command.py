"""hdm-sample end to end on a tiny trained-model folder."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from hdm_lightning import HDMPipeline
from hdm_lightning.cli import sample
from hdm_lightning.generation.image_files import ImageRecord, read_record
from toy_run import shaken_state, write_final


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_text_encoder, tiny_autoencoder):
    folder = tmp_path_factory.mktemp("run")
    sampling = {"height": 32, "width": 32, "steps": 3}
    write_final(folder / "final", tiny_text_encoder, tiny_autoencoder, shaken_state(), raw=True, sampling=sampling)
    return folder


def drawn(folder, *arguments):
    """The one image that the command draws into a folder."""
    assert sample.main([*map(str, arguments), "--out", str(folder)]) == 0
    (image,) = folder.glob("*.png")
    return image


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_prompts_sizes_and_counts_make_pictures_records_and_a_sheet(run_folder, tmp_path, capsys):
    command = [run_folder, "a red circle", "a star", "--count", "2", "--size", "32x32", "--size", "48x16"]
    assert sample.main([*map(str, command), "--out", str(tmp_path), "--steps", "2"]) == 0
    written = capsys.readouterr().out.split()
    assert len(written) == 9
    names = sorted(path.name for path in tmp_path.glob("0*.png"))
    assert names[:3] == ["0000-a-red-circle-0.png", "0001-a-red-circle-1.png", "0002-a-star-0.png"]
    assert pixels(tmp_path / names[0]).shape == (32, 32, 3)
    assert pixels(tmp_path / names[-1]).shape == (16, 48, 3)
    record = read_record(tmp_path / names[-1])
    assert (record.prompt, record.seed) == ("a star", 1)
    assert (record.settings.width, record.settings.height, record.settings.steps) == (48, 16, 2)
    assert min(pixels(tmp_path / "sheet-0000.png").shape[:2]) > 400
    assert len({pixels(tmp_path / name).tobytes() for name in names}) == 8


def test_drawing_loads_nothing_of_training(run_folder, tmp_path):
    """transformers and diffusers, which take seconds, are needed; Lightning, Hydra and what they bring are not."""
    unneeded = {"lightning", "hydra", "torchmetrics", "webdataset", "tensorboard", "matplotlib", "pandas", "datasets"}
    unneeded |= {"torchvision", "timm", "gradio"}
    program = (
        "import sys; from hdm_lightning.cli.sample import main\n"
        f"status = main([{str(run_folder)!r}, 'a star', '--steps', '1', '--out', {str(tmp_path)!r}])\n"
        f"print(status, sorted({unneeded} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.splitlines()[-1] == "0 []"


def test_repeat_gives_the_same_pixels(run_folder, tmp_path):
    first = [run_folder, "a red circle", "--seed", "11", "--x-shift", "0.25", "--guidance", "2.5", "--shift", "2"]
    camera = ["--zoom", "1.2", "--y-shift", "-0.1", "--guidance-interval", "0.1", "0.8", "--weak-rate", "0.6"]
    original = drawn(tmp_path / "a", *first, *camera, "--routing-guidance", "1.5")
    settings = read_record(original).settings
    assert (settings.x_shift, settings.y_shift, settings.zoom) == (0.25, -0.1, 1.2)
    assert (settings.guidance_interval, settings.routing_scale, settings.weak_rate) == ((0.1, 0.8), 1.5, 0.6)
    repeated = drawn(tmp_path / "b", "--repeat", original)
    assert np.array_equal(pixels(original), pixels(repeated))
    assert read_record(original) == read_record(repeated)
    assert sample.main(["--repeat", str(original), "--out", str(tmp_path / "c"), "--steps", "5"]) == 0
    (changed,) = (tmp_path / "c").glob("*.png")
    assert not np.array_equal(pixels(original), pixels(changed))
    assert read_record(changed).settings.guidance_scale == 2.5


def test_repeat_finds_the_raw_weights_and_the_picture_it_started_from(run_folder, tmp_path, capsys):
    start = tmp_path / "start.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(start)
    command = [run_folder, "a star", "--weights", "raw", "--image", start, "--strength", "0.5", "--out", tmp_path / "a"]
    assert sample.main([*map(str, command)]) == 0
    (original,) = (tmp_path / "a").glob("*.png")
    repeated = drawn(tmp_path / "b", "--repeat", original)
    assert np.array_equal(pixels(original), pixels(repeated))
    assert "is not the one" not in capsys.readouterr().err
    Image.fromarray(255 - noise).save(start)
    assert sample.main(["--repeat", str(original), "--out", str(tmp_path / "c")]) == 0
    assert f"{start} is not the one" in capsys.readouterr().err


def test_repeat_of_a_picture_drawn_from_noise_takes_a_strength_with_an_image_only(run_folder, tmp_path, capsys):
    original = drawn(tmp_path / "a", run_folder, "a star")
    command = ["--repeat", str(original), "--strength", "0.5", "--out"]
    capsys.readouterr()
    assert sample.main([*command, str(tmp_path / "b")]) == 2
    assert "--strength: needs an image to start from" in capsys.readouterr().err
    assert sample.main([*command, str(tmp_path / "c"), "--image", str(original)]) == 0
    (changed,) = (tmp_path / "c").glob("*.png")
    assert (read_record(changed).image, read_record(changed).settings.strength) == (str(original), 0.5)
    weaker = drawn(tmp_path / "d", "--repeat", changed, "--strength", "0.25")
    assert read_record(weaker).settings.strength == 0.25
    assert not np.array_equal(pixels(changed), pixels(weaker))


def test_repeat_takes_the_encoders_and_the_precision_that_were_named(
    run_folder, tmp_path, tiny_text_encoder, tiny_autoencoder
):
    encoder, vae = tmp_path / "encoder", tmp_path / "vae"
    shutil.copytree(tiny_text_encoder, encoder)
    shutil.copytree(tiny_autoencoder, vae)
    written = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(written | {"latents_std": [1.5] * 4}))
    named = ["--vae", str(vae), "--text-encoder", str(encoder), "--precision", "bfloat16"]
    original = drawn(tmp_path / "a", run_folder, "a star", *named)
    record = read_record(original)
    assert record.loaded_with == {"precision": "bfloat16", "vae": str(vae), "text_encoder": str(encoder)}
    repeated = drawn(tmp_path / "b", "--repeat", original)
    assert np.array_equal(pixels(original), pixels(repeated))
    assert read_record(repeated) == record
    own = drawn(tmp_path / "c", run_folder, "--repeat", original)
    assert read_record(own).loaded_with == {"precision": "bfloat16"}
    assert not np.array_equal(pixels(original), pixels(own))


def test_pictures_of_before_the_precision_was_recorded_can_be_repeated(run_folder, tmp_path):
    original = drawn(tmp_path / "a", run_folder, "a star")
    old = read_record(original).to_json()
    del old["loaded_with"]
    assert ImageRecord.from_json(old) == replace(read_record(original), loaded_with={})


def test_a_picture_of_any_size_keeps_its_size_where_padding_is_asked_for(run_folder, tmp_path, capsys):
    start = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 59, 3), dtype=np.uint8)).save(start)
    command = [str(run_folder), "a star", "--image", str(start), "--strength", "0.3"]
    assert sample.main([*command, "--size", "image", "--out", str(tmp_path / "a")]) == 2
    assert "--size: both sides of 59x41 must be multiples of 4\n  hint: use 60x40, or add" in capsys.readouterr().err
    padded = ["--size", "image", "--on-indivisible", "pad"]
    original = drawn(tmp_path / "a", *command, *padded)
    assert "warning" not in capsys.readouterr().err
    assert pixels(original).shape == (41, 59, 3)
    repeated = drawn(tmp_path / "b", "--repeat", original)
    assert np.array_equal(pixels(original), pixels(repeated))
    assert sample.main([*command, "--out", str(tmp_path / "c")]) == 0
    assert f"warning: {start} is scaled and center-cropped to 32x32" in capsys.readouterr().err


def test_prompts_from_a_file_and_from_standard_input(run_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star\n", encoding="utf-8")
    arguments = [str(run_folder), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "a")]
    assert sample.main([*arguments, "--no-sheet"]) == 0
    assert len(list((tmp_path / "a").iterdir())) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("a green square\n"))
    assert sample.main([str(run_folder), "--out", str(tmp_path / "a")]) == 0
    assert read_record(tmp_path / "a" / "0002-a-green-square-0.png").prompt == "a green square"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["a star", "--size", "33x32"],
            "--size: both sides of 33x32 must be multiples of 4\n  hint: use 32x32, or add --on-indivisible pad",
        ),
        (["a star", "--size", "big"], "--size: 'big' is not a size"),
        (["a star", "--size", "image"], "--size image: needs an image to start from"),
        (["a star", "--solver", "magic"], "--solver: 'magic' is not known"),
        (["a star", "--count", "0"], "--count: 0 is below 1"),
        (["a star", "--seed", str(2**63 - 2), "--count", "3"], f"--seed: counts up to {2**63}"),
        (["a star", "--zoom", "inf"], "zoom: got inf"),
        (["a star", "--strength", "0.5"], "--strength: needs an image to start from"),
        (["a star", "--stepz", "4"], "unknown argument '--stepz'\n  hint: did you mean '--steps'?"),
        (["a star", "steps=4"], "steps=4: is an option without dashes\n  hint: hdm-sample takes flags: --steps 4;"),
        (
            [f"steps={'very ' * 60}many"],
            "is an option without dashes\n  hint: hdm-sample takes flags: --steps 'very",
        ),
        (["a star", "on_indivisible=pad"], "hint: hdm-sample takes flags: --on-indivisible pad;"),
        (["a star", "--image", "nowhere.png"], "nowhere.png: does not exist"),
        (["a star", "--device", "abacus"], "--device: 'abacus' is not a device"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read"),
        (["a star", "--out", "/dev/null"], "--out /dev/null: cannot be created"),
        (["a star", "--text-encoder", "./nowhere"], "text_encoder: there is no folder './nowhere'"),
    ],
)
def test_mistakes_are_told_on_one_screen_with_status_2(run_folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert sample.main([str(run_folder), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) < 10
    assert "Traceback" not in errors


def test_prompts_that_are_longer_than_the_model_reads_are_warned_of(run_folder, tmp_path, capsys):
    long, short = " ".join(["a red star"] * 6), " ".join(["a red star"] * 5)
    assert sample.main([str(run_folder), long, short, long, "--out", str(tmp_path)]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    tokenizer = HDMPipeline.from_pretrained(run_folder).caption_tokenizer
    whole = tokenizer.tokenizer.transformers(long)["input_ids"]
    assert f"the last {len(whole) - 16} are cut" in warnings[0] and "red star'" in warnings[0]
    with pytest.warns(UserWarning, match=f"the last {len(whole) - 16} are cut"):
        HDMPipeline.from_pretrained(run_folder)(long, num_inference_steps=1)


def test_without_model_or_with_a_plain_picture(tmp_path, capsys):
    assert sample.main([]) == 2
    assert "MODEL: is missing" in capsys.readouterr().err
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert sample.main(["--repeat", str(tmp_path / "plain.png")]) == 2
    assert "contains no settings" in capsys.readouterr().err


def test_a_compiled_network_draws_the_same_with_a_graph_for_each_kind_of_block_and_batch(
    run_folder, tmp_path, monkeypatch, capsys
):
    """Guidance doubles the batch within its interval: two batches, and two kinds of blocks of this network in each."""
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    command = [str(run_folder), "a red circle", "--steps", "4", "--guidance-interval", "0.4", "1"]
    for name, option in (("plain", []), ("compiled", ["--compile"])):
        assert sample.main([*command, *option, "--out", str(tmp_path / name)]) == 0
        assert graphs.frame_count == (4 if option else 0)
    plain, compiled = (pixels(next((tmp_path / name).glob("0*.png"))) for name in ("plain", "compiled"))
    assert np.abs(plain.astype(int) - compiled.astype(int)).max() <= 1
