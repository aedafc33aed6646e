"""The network against tensors made by running the published implementation in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hdm_lightning.interop import published
from hdm_lightning.interop.published import published_names
from hdm_lightning.models import XUT
from hdm_lightning.models.positions import token_positions

FILES = sorted((Path(__file__).parent.parent / "golden").glob("*.safetensors"))
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


class Golden:
    """A golden file and the network with its weights, in one dtype."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            self.settings = dict(file.metadata())
        self.dtype = dtype
        self.config = published.config_from_json(json.loads(self.settings["config"]))
        self.weights = {n.removeprefix("weight."): t for n, t in self.tensors.items() if n.startswith("weight.")}
        self.model: XUT = published.load_xut(self.config, self.weights).to(dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    def velocity(self, latent: Tensor, t: Tensor, context: Tensor, keep: Tensor | None = None) -> Tensor:
        positions = self["mid.token_positions"] if "in.pos_map" in self.tensors else None
        aspect = self["in.log_aspect_ratio"]
        return self.model(latent, t, context, token_positions=positions, log_aspect_ratio=aspect, keep=keep)


@pytest.fixture(
    scope="module", params=[(p, d) for p in FILES for d in TOLERANCE], ids=lambda v: f"{v[0].stem}-{str(v[1])[6:]}"
)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(*request.param)


def agree(found: Tensor, golden: Golden, name: str) -> None:
    expected = golden.tensors[name].double()
    error = (found.detach().double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[golden.dtype], f"{name}: relative error {error:.2e}"


def test_three_files_are_there() -> None:
    assert len(FILES) >= 3


def test_velocity_and_gradients(golden: Golden) -> None:
    latent = golden["in.latent"].requires_grad_()
    velocity = golden.velocity(latent, golden["in.t"], golden["in.context"])
    (velocity * golden["in.probe"]).sum().backward()
    agree(velocity, golden, "out.velocity")
    assert latent.grad is not None
    agree(latent.grad, golden, "out.grad_latent")
    names = published_names(golden.model)
    compared = 0
    for name, parameter in golden.model.named_parameters():
        assert parameter.grad is not None
        agree(parameter.grad.norm(), golden, f"gradnorm.{names[name]}")
        compared += 1
    assert compared == sum(name.startswith("gradnorm.") for name in golden.tensors)


def test_routed_velocity(golden: Golden) -> None:
    keep = golden.tensors["in.tread_keep"].bool()
    indices = keep.nonzero()[:, 1].view(keep.shape[0], -1)
    shuffled = indices[:, torch.randperm(indices.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        for form in (keep, indices, shuffled):
            velocity = golden.velocity(golden["in.latent"], golden["in.t"], golden["in.context"], form)
            agree(velocity, golden, "out.velocity_tread")


def test_token_positions_of_the_full_grid(golden: Golden) -> None:
    if "in.pos_map" in golden.tensors:
        return
    rows, columns = (size // golden.config.patch_size for size in golden["in.latent"].shape[2:])
    found = token_positions(rows, columns, convention="long_side", dtype=golden.dtype)
    assert torch.allclose(found, golden["mid.token_positions"], atol=1e-6)


def test_token_positions_of_a_crop(golden: Golden) -> None:
    """Inside, where the published average over a patch is its centre; at the border it reaches past the crop."""
    if "in.pos_map" not in golden.tensors:
        return
    patch, (rows, columns) = golden.config.patch_size, golden["in.latent"].shape[2:]
    cells = golden["in.pos_map"].view(-1, rows, columns, 2)
    # A square as long as the long side of the full image: its positions are those of any image about the same centre.
    full = 2 / (cells[:, 0, 1, 1] - cells[:, 0, 0, 1])
    corner = ((cells[:, 0, 0] + 1) * full[:, None] - 1) / 2
    crop = torch.cat((corner, full[:, None], full[:, None]), dim=1) / patch
    found = token_positions(rows // patch, columns // patch, crop=crop, convention="long_side")
    inside = lambda positions: positions.unflatten(1, (rows // patch, columns // patch))[:, 1:-1, 1:-1]  # noqa: E731
    assert torch.allclose(inside(found), inside(golden["mid.token_positions"]), atol=1e-6)


def test_weights_survive_import_and_export(golden: Golden) -> None:
    exported = published.export_state_dict(published.load_xut(golden.config, golden.weights))
    assert exported.keys() == golden.weights.keys()
    for name, tensor in golden.weights.items():
        assert exported[name].dtype == tensor.dtype
        assert torch.equal(exported[name], tensor), name
