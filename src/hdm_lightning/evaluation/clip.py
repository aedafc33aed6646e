"""A CLIP: image features, and its score of an image with a caption (arXiv 2104.08718).

Shapes: images (B,3,H,W), uint8; features (B,D).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hdm_lightning.encoders.pretrained import locate_model, read_tokenizer, readable
from hdm_lightning.errors import UserError
from hdm_lightning.generation.feature_networks import (
    VISION_DOWNLOAD,
    VISION_FILES,
    measured_network,
    pooled,
    read_vision_model,
    vision_preprocessing,
)
from hdm_lightning.metrics.features import FeatureNetwork

WHERE = "--clip"
_TEXT_BATCH = 64


@dataclass(frozen=True)
class Clip:
    """A CLIP-like dual encoder: `name` as in measures' names, its image half as a feature network of unit vectors."""

    name: str
    network: FeatureNetwork
    model: Any
    tokenizer: Any
    context_length: int

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Return unit vectors (B,D) of captions."""
        found = []
        for start in range(0, len(captions), _TEXT_BATCH):
            part = list(captions[start : start + _TEXT_BATCH])
            tokens = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
            ).to(self.network.device)
            output = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
            found.append(F.normalize(pooled(output).float(), dim=1))
        return torch.cat(found)


def clip_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return 100 · max(cosine, 0) of each image with its caption, (B,), as torchmetrics' CLIPScore does.

    Args:
        image_features, text_features: unit vectors (B,D).
    """
    return 100 * (image_features * text_features).sum(1).clamp(min=0)


def load_clip(name: str, device: torch.device) -> Clip:
    """Load a CLIP by hub name or folder. Raises UserError: it is not available, or not a model of images and texts."""
    try:
        folder = locate_model(name, where=WHERE, required=VISION_FILES, download=[*VISION_DOWNLOAD, "*.txt"])
    except UserError as error:
        hint = error.hint_with("or leave --clip out: a small head is trained on the training set")
        raise UserError(error.what, where=WHERE, hint=hint) from error
    model = read_vision_model(folder, WHERE)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise UserError(f"{name} is not a model of images and texts", where=WHERE, hint="pass a CLIP or SigLIP")
    model = model.to(device)
    preprocessing = vision_preprocessing(folder)

    def image_features(images: Tensor) -> Tensor:
        return F.normalize(pooled(model.get_image_features(pixel_values=images)), dim=1)

    network = measured_network("transformers", name, preprocessing, image_features, device)
    text_config = getattr(model.config, "text_config", model.config)
    length = int(getattr(text_config, "max_position_embeddings", 77))
    with readable("transformers cannot read a tokenizer", folder, where=WHERE):
        tokenizer = read_tokenizer(folder)
    return Clip(network.name, network, model, tokenizer, length)
