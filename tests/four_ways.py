"""One model, drawn by HDMPipeline, hdm-sample, ComfyUI's nodes and hdm-app's page: which pixels differ, as a table.

COMFYUI=/path/to/ComfyUI PYTHONPATH=tests python tests/four_ways.py runs/mine/final "a red apple" 128x128

The page is used in Chromium; gradio and playwright are in the extras `app` and `browser`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from drawing_workflow import SEED, by_solver, drawing
from hdm_lightning import HDMPipeline
from hdm_lightning.cli import sample
from real_comfyui import ComfyUI, started

STEPS, GUIDANCE, SOLVER = 20, 3.0, "ab2"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAITING_MS = 300_000

Levels = NDArray[np.uint8]


def by_pipeline(model: Path, prompt: str, width: int, height: int) -> Levels:
    """As in Python."""
    pipeline = HDMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "solver": SOLVER}
    return np.asarray(pipeline(prompt, height=height, width=width, seed=SEED, **settings).images[0])


def by_command(model: Path, prompt: str, width: int, height: int, out: Path) -> Levels:
    """As on the command line."""
    settings = ["--steps", str(STEPS), "--guidance", str(GUIDANCE), "--solver", SOLVER, "--seed", str(SEED)]
    size = ["--size", f"{width}x{height}", "--device", "cpu", "--out", str(out)]
    assert sample.main([str(model), prompt, *settings, *size]) == 0
    return levels(next(out.glob("*.png")))


def by_nodes(comfyui: ComfyUI, model: Path, prompt: str, width: int, height: int) -> Levels:
    """In ComfyUI."""
    graph = drawing("(by path)", prompt=prompt, width=width, height=height, cfg=GUIDANCE)
    graph["model"]["inputs"]["path"] = str(model.resolve())
    (picture,) = comfyui.pictures(comfyui.run(by_solver(graph, SOLVER, STEPS)))
    return levels(picture)


def by_page(address: str, own_steps: int, prompt: str, width: int, height: int, out: Path) -> Levels:
    """In a browser, by its form, once it shows the model's own settings; the picture that it wrote."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.wait_for_function("document.querySelector('#models')?.innerText.includes('final')", timeout=WAITING_MS)
        page.wait_for_function(f"document.querySelector('#steps input').value == '{own_steps}'", timeout=WAITING_MS)
        wanted = {"prompt": prompt, "seed": SEED, "width": width, "height": height}
        for name, value in {**wanted, "steps": STEPS, "guidance_scale": GUIDANCE, "images": 1}.items():
            page.locator(f"#{name} textarea, #{name} input").first.fill(str(value))
        page.locator("#draw").click()
        page.wait_for_function("document.querySelectorAll('#drawn img').length == 1", timeout=WAITING_MS)
        browser.close()
    return levels(max(out.rglob("*.png"), key=lambda path: path.stat().st_mtime_ns))


@contextmanager
def served(model: Path, out: Path) -> Iterator[str]:
    """The page's address, while it draws this one model into a folder."""
    runs = out / "runs"
    runs.mkdir(parents=True)
    options = ["--port", "0", "--device", "cpu", "--models", str(model.resolve()), "--runs", str(runs)]
    command = [sys.executable, "-m", "hdm_lightning.app.serve", *options, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout is not None
            yield page.stdout.readline().split()[1]
        finally:
            page.terminate()


def levels(path: Path) -> Levels:
    """The picture's values (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB"))


def main(model: Path, prompt: str, size: str) -> None:
    """Draw, and print the table; the model is a pipeline's folder, such as a run's final/."""
    steps = json.loads((model / "model_index.json").read_text())["sampling"]["steps"]
    width, height = map(int, size.split("x"))
    asked = (model, prompt, width, height)
    with TemporaryDirectory() as place:
        out = Path(place)
        drawn = {"`hdm-sample`": by_command(*asked, out / "command"), "`HDMPipeline`": by_pipeline(*asked)}
        with served(model, out / "page") as address:
            drawn["`hdm-app` in Chromium"] = by_page(address, steps, prompt, width, height, out / "page")
        comfyui = started(out / "comfyui")
        try:
            drawn["ComfyUI: HDM Solver, HDM Times"] = by_nodes(comfyui, *asked)
        finally:
            comfyui.stop()
    first = next(iter(drawn.values()))
    print("| drawn by | values that differ | largest difference |\n|---|---:|---:|")
    for name, picture in drawn.items():
        apart = abs(picture.astype(int) - first.astype(int))
        print(f"| {name} | {(apart > 0).sum():,} of {apart.size:,} | {apart.max()} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
