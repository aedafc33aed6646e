"""Euler sampling with guidance against samples drawn by the published implementation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hdm_lightning.diffusion import sampling
from hdm_lightning.diffusion.guidance import Guide, Guided
from hdm_lightning.interop import published

SAMPLE = "out.sample_euler_cfg3"


def files_with_samples() -> list[Path]:
    chosen = []
    for path in sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            chosen += [path] if SAMPLE in file.keys() else []  # noqa: SIM118  (not a mapping)
    return chosen


def test_there_are_golden_samples() -> None:
    assert len(files_with_samples()) >= 2


@pytest.mark.parametrize("path", files_with_samples(), ids=lambda path: path.stem)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_guided_euler_samples(path: Path, dtype: torch.dtype, tolerance: float) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    weights = {n.removeprefix("weight."): v.to(dtype) for n, v in tensors.items() if n.startswith("weight.")}
    model = published.load_xut(json.loads(metadata["config"]), weights).eval()

    def branch(context: str) -> sampling.Velocity:
        @torch.no_grad()
        def velocity(x: Tensor, t: float) -> Tensor:
            return model(
                x,
                x.new_full(x.shape[:1], t),
                tensors[context].to(dtype),
                log_aspect_ratio=tensors["in.log_aspect_ratio"].to(dtype),
            )

        return velocity

    scale = float(metadata["cfg_scale"])
    velocity = Guided(branch("in.context"), (Guide(branch("in.sample_uncond_context"), scale),))
    grid = sampling.shifted_grid(int(metadata["steps"]), 1.0)
    sample = sampling.euler(velocity, tensors["in.sample_noise"].to(dtype), grid)
    expected = tensors[SAMPLE]
    error = (sample.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance
