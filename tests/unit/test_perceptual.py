"""The perceptual distances: the network against another implementation, and what a frozen distance must keep."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import pytest
import torch
from torch import nn

from hdm_lightning.autoencoding.efficientnet_lite0 import normalised
from hdm_lightning.autoencoding.perceptual import (
    LITE0,
    SMALLEST_SIDES,
    FrozenDistance,
    feature_distance,
    lite0_network,
    perceptual_distance,
)
from hdm_lightning.errors import UserError


def pattern(size):
    rows, columns = torch.arange(float(size))[:, None], torch.arange(float(size))[None, :]
    waves = [torch.sin(rows / 3 + columns / 7), torch.cos(rows / 5 - columns / 4), torch.sin(rows * columns / 400)]
    return torch.stack(waves)[None]


@pytest.mark.parametrize(
    ("size", "logits", "deviation", "best"),
    [
        (64, [-2.4057953, 3.9205937, 2.3866008, -6.8438163, -3.7926259, -0.3701089], 4.3074861, 616),
        (71, [-1.1836981, 1.9127676, 1.5899693, -0.6971352, 0.4596656, 1.5482178], 2.3859487, 906),
    ],
)
def test_logits_are_those_of_timm_with_the_same_weights(size, logits, deviation, best):
    """Recorded from timm 1.0.31, tf_efficientnet_lite0, at an even and an odd size (padding differs)."""
    with torch.no_grad():
        found = lite0_network()(pattern(size))[0]
    torch.testing.assert_close(found[:6], torch.tensor(logits), rtol=0, atol=2e-4)
    assert found.std().item() == pytest.approx(deviation, rel=1e-4)
    assert found.argmax().item() == best


def test_normalisation_takes_grey_levels():
    levels = torch.tensor([0.0, 127.0, 255.0]) / 127.5 - 1
    torch.testing.assert_close(normalised(levels), torch.tensor([-127 / 128, 0.0, 1.0]))


def test_feature_maps_have_the_stated_sizes():
    maps = lite0_network().feature_maps(pattern(70), range(7))
    sizes = [(16, 35), (24, 18), (40, 9), (80, 5), (112, 5), (192, 3), (320, 3)]  # channels, side
    assert [(each.shape[1], each.shape[2]) for each in maps] == sizes


def test_distance_grows_with_the_damage_and_is_zero_for_equals():
    distance = perceptual_distance(LITE0)
    image = pattern(64)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    found = [distance(image + strength * noise, image).item() for strength in (0.0, 0.02, 0.1, 0.5)]
    assert found[0] == 0
    assert found == sorted(found) and found[1] > 0


def test_feature_distance_of_known_vectors():
    first = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    second = torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1)
    assert feature_distance(first, second).item() == pytest.approx(0.6**2 + 0.2**2, rel=1e-6)
    assert feature_distance(first, 5 * first).item() == pytest.approx(0.0, abs=1e-9)


def test_a_module_that_holds_a_distance_neither_trains_nor_saves_it():
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.distance = FrozenDistance(torch.nn.BatchNorm1d(2), lambda network, output, target: output)

    holder = Holder()
    holder.train()
    assert not holder.distance.network.training
    assert not holder.state_dict()


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision with AlexNet's layers (its weights random) and without a network for VGG."""
    import torchmetrics.functional.image.lpips
    import torchmetrics.image.lpip

    torch.manual_seed(0)
    alexnet = ModuleType("alexnet")
    alexnet.features = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        *(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1)),
        *(nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )

    def unreachable(weights):
        raise URLError("no route to host")

    module = ModuleType("torchvision")
    module.models = ModuleType("torchvision.models")
    module.models.alexnet, module.models.vgg16 = lambda weights: alexnet, unreachable
    for name in ("AlexNet_Weights", "VGG16_Weights"):
        setattr(module.models, name, ModuleType(name))
        getattr(module.models, name).DEFAULT = name
    monkeypatch.setitem(sys.modules, "torchvision", module)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "torchvision" or find_spec(name))
    for user in (torchmetrics.functional.image.lpips, torchmetrics.image.lpip):
        monkeypatch.setattr(user, "_TORCHVISION_AVAILABLE", True)
    return module


def test_lpips_is_its_published_formula_on_images_from_minus_one_to_one(torchvision):
    """Σ over layers of the mean over positions of w·(unit(f₁) − unit(f₂))² (arXiv 1801.03924, equation 1)."""
    import torchmetrics.functional.image

    distance = perceptual_distance("lpips_alex")
    images = torch.cat([pattern(64), pattern(64).flip(2)])
    found = distance(images, 0.5 * images)

    folder = Path(torchmetrics.functional.image.__file__).parent / "lpips_models"
    learned = torch.load(folder / "alex.pth", map_location="cpu", weights_only=True)
    layers = torchvision.models.alexnet(None).features
    scaling = [torch.tensor(each).reshape(1, 3, 1, 1) for each in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])]
    one, other = ((each - scaling[0]) / scaling[1] for each in (images, 0.5 * images))
    expected, taken = torch.zeros(2), 0
    for number, layer in enumerate(layers):
        one, other = layer(one), layer(other)
        if number in (1, 4, 7, 9, 11):
            units = [each / each.norm(dim=1, keepdim=True).clamp(min=1e-4) for each in (one, other)]
            weight = learned[f"lin{taken}.model.1.weight"].flatten()
            expected += torch.einsum("bchw,c->bhw", (units[0] - units[1]) ** 2, weight).mean((1, 2))
            taken += 1
    assert found.shape == (2,) and found.min() > 0
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [LITE0, "lpips_alex"])
def test_gradient_flows_to_the_image_and_not_to_the_network(torchvision, name):
    distance = perceptual_distance(name)
    image = pattern(64).requires_grad_()
    before = {key: value.clone() for key, value in distance.network.state_dict().items()}
    distance(image, 0.5 * pattern(64)).sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in distance.network.parameters())
    assert not any(module.training for module in distance.network.modules())
    after = distance.network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_lpips_without_its_weights_says_what_to_do(torchvision):
    with pytest.raises(UserError, match=r"vgg are not on this machine.*no route to host") as caught:
        perceptual_distance("lpips_vgg")
    assert caught.value.where == "loss.perceptual_network" and LITE0 in caught.value.hint


def test_what_is_missing_or_unknown_is_named(monkeypatch):
    with pytest.raises(UserError, match="not one of efficientnet_lite0, lpips_vgg"):
        perceptual_distance("vgg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torchvision") as caught:
        perceptual_distance("lpips_vgg")
    assert "hdm-lightning[lpips]" in str(caught.value)
    lite0_network.cache_clear()
    with pytest.raises(UserError, match="not installed"):
        perceptual_distance(LITE0)


def pooled(ceil_mode):
    return nn.MaxPool2d(3, 2, ceil_mode=ceil_mode)


# What of each network changes the size, up to the last features that LPIPS takes (arXiv 1801.03924).
RESIZING = {
    "lpips_vgg": [nn.MaxPool2d(2, 2)] * 4,
    "lpips_alex": [nn.Conv2d(1, 1, 11, 4, 2), pooled(False), pooled(False)],
    "lpips_squeeze": [nn.Conv2d(1, 1, 3, 2), pooled(True), pooled(True), pooled(True)],
}


@pytest.mark.parametrize("name", RESIZING)
def test_the_smallest_side_is_the_smallest_that_the_network_leaves_something_of(name):
    network = nn.Sequential(*RESIZING[name])
    side = SMALLEST_SIDES[name]
    assert min(network(torch.zeros(1, 1, side, side)).shape) >= 1
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 1, side - 1, side - 1))
