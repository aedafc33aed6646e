"""The built wheel, run from another folder: everything that the commands need is inside."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "train_vae", "sample", "evaluate", "shards", "convert", "plan", "bench", "demo")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was unpacked, as `pip install` does."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(installed, cwd, command, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    code = f"import hdm_lightning, hdm_lightning.cli.{command} as c; print(hdm_lightning.__file__); c.main()"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert str(installed) in result.stdout.splitlines()[0], "the tests ran another copy of the package"
    return result


@pytest.mark.parametrize("command", COMMANDS)
def test_help_works_outside_the_repository(installed, tmp_path, command):
    result = run(installed, tmp_path, command, "--help")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 5


def test_two_steps_of_training_outside_the_repository(
    installed, tmp_path, tiny_text_encoder, tiny_autoencoder, tiny_shards
):
    model = "channels=4 patch_size=1 width=32 mlp_width=48 heads=2 head_dim=16 context_width=16 depth=1"
    stage = "resolution=16 samples=16 batch_size=8 micro_batch_size=8 context_length=8"
    overrides = [
        "trainer=cpu",
        f"text_encoder.name={tiny_text_encoder}",
        "vae=folder",
        f"vae.name={tiny_autoencoder}",
        f"data.train={tiny_shards}",
        "data.workers=0",
        "validation.samples=8",
        *(f"~schedule.stages.px{size}" for size in (512, 768, 1024)),
        *(f"schedule.stages.px256.{each}" for each in stage.split()),
        *(f"model.{each}" for each in model.split()),
    ]
    result = run(installed, tmp_path, "train", *overrides)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "train" / "final" / "model_index.json").exists()
    drawn = run(installed, tmp_path, "sample", "runs/train", "a red circle", "--size", "16x16", "--out", "pictures")
    assert drawn.returncode == 0, drawn.stderr
    assert list((tmp_path / "pictures").glob("*.png"))


def test_a_report_is_written_outside_the_repository(installed, tmp_path, tiny_autoencoder, tiny_shards):
    counts = ["--size", "16", "--samples", "6", "--resamples", "5", "--set-resamples", "2", "--perceptual", "none"]
    arguments = ["vae", str(tiny_autoencoder), "--data", str(tiny_shards), *counts, "--out", str(tmp_path / "out")]
    result = run(installed, tmp_path, "evaluate", *arguments)
    assert result.returncode == 0, result.stderr
    assert "reconstruction_psnr_db" in (tmp_path / "out" / "report.html").read_text()
