"""A model drawn in ComfyUI and by hdm-sample, beside each other: how far apart the pictures are, as a table.

COMFYUI=/path/to/ComfyUI PYTHONPATH=tests python tests/comfyui/compare.py runs/demo/model "a red circle" 64x64
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from drawing_workflow import SEED, Graph, by_solver, drawing, node, with_camera, with_model
from hdm_lightning.cli import sample
from real_comfyui import ComfyUI, started

EULER = ("--solver", "euler", "--steps", "20")
GUIDED = ("--routing-guidance", "1.5")


def cases(plain: Callable[..., Graph]) -> list[tuple[str, Graph, Sequence[str]]]:
    """Name, workflow, and hdm-sample's options for the same."""
    routed = node("HDMRoutingGuidance", model=["model", 0], scale=1.5, weak_rate=0.5)
    return [
        ("KSampler: euler, simple, 20 steps, cfg 1", plain(steps=20, cfg=1.0), (*EULER, "--guidance", "1")),
        ("the same, cfg 3, no negative prompt", plain(steps=20), (*EULER, "--guidance", "3")),
        (
            "the same with a negative prompt",
            plain(steps=20, negative="a large green star"),
            (*EULER, "--guidance", "3", "--negative-prompt", "a large green star"),
        ),
        (
            "HDM Camera 0.3, 0, 1.2",
            with_camera(plain(steps=20), 0.3, 0.0, 1.2),
            (*EULER, "--x-shift", "0.3", "--zoom", "1.2"),
        ),
        ("HDM Routing Guidance 1.5", with_model(plain(steps=20), routed), (*EULER, *GUIDED)),
        (
            "HDM Solver ab2, HDM Times 16 steps",
            by_solver(plain(), "ab2", 16, 0.0),
            ("--solver", "ab2", "--steps", "16"),
        ),
    ]


def levels(path: Path) -> NDArray[np.int64]:
    """The picture's values (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB")).astype(np.int64)


def compare(comfyui: ComfyUI, model: Path, prompt: str, size: str, out: Path) -> None:
    """Print the table."""
    width, height = map(int, size.split("x"))

    def plain(**how: object) -> Graph:
        graph = drawing("(by path)", prompt=prompt, width=width, height=height, **how)
        graph["model"]["inputs"]["path"] = str(model.resolve())
        graph["cut"] = node("SaveImage", images=["decoded", 0], filename_prefix="cut")
        return graph

    print("| | largest difference | values that differ | without HDM Round Pixels |\n|---|---:|---:|---:|")
    for number, (name, graph, options) in enumerate(cases(plain)):
        given = [prompt, "--size", size, "--seed", str(SEED), "--out", str(out / str(number)), *options]
        assert sample.main([str(model), *given]) == 0
        expected = levels(next((out / str(number)).glob("*.png")))
        apart, cut = (
            abs(levels(comfyui.pictures({"": comfyui_outputs[key]})[0]) - expected)
            for comfyui_outputs in [comfyui.run(graph)]
            for key in ("saved", "cut")
        )
        print(f"| {name} | {apart.max()} | {(apart > 0).sum()} of {apart.size} | {cut.max()}, {(cut > 0).mean():.0%} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with TemporaryDirectory() as place:
        server = started(Path(place) / "comfyui")
        try:
            compare(server, Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(place) / "drawn")
        finally:
            server.stop()
