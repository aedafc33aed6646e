"""Measures of every training of the study, the same for all of them whatever their latents are.

Shapes: N scenes, K bins of the time, H×W pixels.

The latent loss cannot be compared between two autoencoders, but images can: at a fixed time and noise the network's
one-step estimate of the clean latent, x_t − t·v, is decoded and compared with the true image, pixel by pixel.
`pixel_error` is its mean square (of values from −1 to 1) over logit-normal times of mean 0; the loss from the
autoencoder alone is `reconstruction_error`.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdm_lightning.datasets.shapes import ShapesOptions, make_image, scene_prompts
from hdm_lightning.diffusion import flow
from hdm_lightning.evaluation.flow_loss import bin_shares, times_in_bin
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.generation.guided_branches import encode_texts
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.generation.scoring import draw_and_score, score_decoded
from hdm_lightning.metrics.distances import kernel_distance
from hdm_lightning.metrics.features import FeatureNetwork

SHAPES = ((64, 64), (64, 96), (96, 64), (48, 80), (80, 48))
"""Height and width: the square; wide and tall with its short side, as shifted crops have them; with about its area, as
buckets have them."""
SCENES, BINS, STEPS = 48, 8, 10
PROMPTS = {(64, 64): 64, (64, 96): 24, (96, 64): 24}
"""Number of prompts of each split at each size."""
REFERENCES = 256
VARIATION = 0.5
"""Variation of the scenes, as in the training set."""


def measure(pipeline: HDMPipeline) -> dict[str, Any]:
    """Return all measures of one training's averaged weights."""
    errors = {f"{height}x{width}": one_step_errors(pipeline, height, width) for height, width in SHAPES}
    return {"errors": errors, **_drawn(pipeline)}


@torch.no_grad()
def one_step_errors(pipeline: HDMPipeline, height: int, width: int) -> dict[str, Any]:
    """Return the errors of one-step estimates on whole held-out scenes of one size, by bin of the time."""
    images, captions = _scenes(height, width, SCENES)
    latent = pipeline.autoencoder.encode(images).float()
    text = encode_texts(captions, pipeline.encoder, pipeline.caption_tokenizer, pipeline.device)
    restored = (pipeline.autoencoder.decode(latent) - images).square().mean((1, 2, 3))
    pixel, own = np.empty((BINS, SCENES)), np.empty((BINS, SCENES))
    for number in range(BINS):
        generator = torch.Generator().manual_seed(1_000 * number + height)
        noise = torch.randn(latent.shape, generator=generator)
        t = times_in_bin(torch.rand(SCENES, generator=generator), number, BINS)
        noisy = flow.interpolate(latent, noise, t)
        velocity = pipeline.transformer(noisy, t, text.context, context_lengths=text.lengths)
        own[number] = flow.loss_per_sample(velocity, flow.velocity_target(latent, noise)).numpy()
        clean = pipeline.autoencoder.decode(noisy - t[:, None, None, None] * velocity)
        pixel[number] = (clean - images).square().mean((1, 2, 3)).numpy()
    shares = bin_shares(BINS).numpy()
    return {
        "pixel_error": float(shares @ pixel.mean(1)),
        "latent_loss": float(shares @ own.mean(1)),
        "reconstruction_error": float(restored.mean()),
        "pixel_error_by_time": pixel.mean(1).round(6).tolist(),
        "latent_loss_by_time": own.mean(1).round(6).tolist(),
        "pixel_error_by_scene": (shares @ pixel).round(6).tolist(),
    }


@cache
def _scenes(height: int, width: int, count: int) -> tuple[Tensor, list[str]]:
    """Return images (N,3,H,W) from −1 to 1 of held-out pairs of color and shape, and their captions."""
    short = min(height, width)
    options = ShapesOptions(10, short, (width / height,), split="heldout", variation=VARIATION)
    made = [make_image(options, index) for index in range(count)]
    images = np.stack([image for image, _ in made])
    if images.shape[1:3] != (height, width):
        raise ValueError(f"scenes have {images.shape[1:3]}, expected {(height, width)}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0, [
        facts["captions"][0] for _, facts in made
    ]


def _drawn(pipeline: HDMPipeline) -> dict[str, Any]:
    """Grade generated images of single objects, and compare the square ones with real scenes."""
    scores: dict[str, Any] = {}
    square = []
    for (height, width), count in PROMPTS.items():
        settings = SamplingSettings(height=height, width=width, steps=STEPS, guidance_scale=3.0, shift=2.0)
        for split in ("heldout", "train"):
            prompts = scene_prompts(count, split=split)
            captions, specs = [each.caption for each in prompts], [each.spec for each in prompts]
            drawn = draw_and_score(pipeline, captions, specs, settings)
            scores[f"{height}x{width} {split}"] = drawn.graded.to_json()
            if height == width:
                square.append(drawn.images)
    asked = scene_prompts(PROMPTS[64, 64], split="heldout")
    decoded = score_decoded(pipeline, [each.image(64) for each in asked], [each.spec for each in asked])
    network = _network()
    distance = kernel_distance(_reference(), network(torch.cat(square)))
    return {"drawn": scores, "decoded": decoded.to_json(), "kernel_distance": distance}


@cache
def _network() -> FeatureNetwork:
    return load_feature_network("efficientnet_lite0", torch.device("cpu"))


@cache
def _reference() -> Tensor:
    """Return features of real square scenes of all combinations."""
    options = ShapesOptions(11, 64, (1.0,), split="all", variation=VARIATION)
    images = np.stack([make_image(options, index)[0] for index in range(REFERENCES)])
    whole = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.cat([_network()(part) for part in whole.split(64)])
