"""The part `loss`: the flow-matching loss on held-out images by time, with fixed noise and times.

Shapes: B batch, N samples, K bins of the time t, C channels, H×W latent grid.

Every sample is measured once in each of K equal bins, at a time drawn from the training distribution within the bin.
The bins' means, weighted by their shares of the training times, give the training loss without the variance from
random times (stratified sampling).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdm_lightning.data.loader import ValidationLoader
from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.diffusion import flow
from hdm_lightning.evaluation.context import Context, RealData, needs, require_reference
from hdm_lightning.evaluation.findings import Curve, Found, Measure, Outcomes
from hdm_lightning.generation.guided_branches import computing_in
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.metrics.bootstrap import Bootstrap
from hdm_lightning.training.modules import draws
from hdm_lightning.training.modules.flow_step import Conditioning, crop_geometry, flow_loss

Floats = NDArray[np.float64]


def bin_shares(bins: int) -> Tensor:
    """Return the share of the training times (logit-normal) in each of `bins` equal bins of [0, 1], (K,), float64."""
    cumulative = torch.special.ndtr(torch.logit(torch.linspace(0, 1, bins + 1, dtype=torch.float64)))
    return cumulative.diff()


def times_in_bin(uniform: Tensor, number: int, bins: int) -> Tensor:
    """Map uniforms in [0, 1) to training times in one bin, of the same shape."""
    edges = torch.special.ndtr(torch.logit(torch.tensor([number, number + 1], dtype=torch.float64) / bins))
    spread = edges[0] + uniform.double() * (edges[1] - edges[0])
    inside = flow.logit_normal_times(spread).clamp(number / bins, (number + 1) / bins)
    return inside.to(uniform.dtype)


def loss_table(pipeline: HDMPipeline, loader: ValidationLoader, *, seed: int, bins: int) -> Iterator[Tensor]:
    """Yield the losses (B,K) of each batch's good samples, float64.

    Noise and times depend only on (seed, bin, sample).
    """
    for batch in loader:
        good = batch["weight"] > 0
        image = batch["image"].to(pipeline.device)
        with torch.no_grad():
            latent = pipeline.autoencoder.encode(image.float() / 127.5 - 1.0).float()
            conditioning = _conditioning(pipeline, batch)
            shape = (latent.shape[1], latent.shape[2], latent.shape[3])
            columns = []
            for number in range(bins):
                drawn = draws.draw(seed, f"evaluation/{number}", batch["index"], shape, 0)
                t = times_in_bin(drawn.uniform, number, bins).to(pipeline.device)
                with computing_in(pipeline.autocast, pipeline.device):
                    loss = flow_loss(pipeline.transformer, latent, drawn.noise.to(latent.device), t, conditioning)
                columns.append(loss.double().cpu())
        yield torch.stack(columns, dim=1)[good]


def _conditioning(pipeline: HDMPipeline, batch: Any) -> Conditioning:
    device, config = pipeline.device, pipeline.transformer.config
    lengths, crop = batch["lengths"].to(device), batch["crop"].to(device)
    tokens = batch["tokens"][:, : int(batch["lengths"].max())].to(device)
    context = pipeline.encoder.encode(tokens, lengths).float()
    side_h, side_w = (side // pipeline.size_multiple for side in batch["image"].shape[-2:])
    positions, aspect = crop_geometry(crop, (side_h, side_w), pipeline.size_multiple, config.positions)
    return Conditioning(context, lengths, positions, aspect)


@needs()
def measure_loss(context: Context) -> Found:
    """Measure the flow loss on held-out images, overall and by time, on training images, and against other weights."""
    settings, real = context.settings, context.real
    bootstrap, bins, shares = settings.bootstrap, settings.time_bins, bin_shares(settings.time_bins).numpy()
    table = _losses(context, real.reference_stream, real.reference_plan, "flow loss")
    whole = table @ shares
    about = "Mean squared error of the velocity on reference images, over times distributed as in training."
    measures = [Measure("flow_loss", bootstrap.mean(whole), "lower", about=about)]
    measures += _of_training(context, shares) + _against_others(real, context.weights, whole, bootstrap)
    edges = [number / bins for number in range(bins + 1)]
    estimates = tuple(bootstrap.mean(column) for column in table.T)
    for (low, high), estimate in zip(pairwise(edges), estimates, strict=True):
        about = f"The same at times from {low:g} (image) to {high:g} (noise: 1)."
        measures.append(Measure(f"flow_loss_t_{low:.3g}_{high:.3g}", estimate, "lower", about=about))
    centres = tuple((low + high) / 2 for low, high in pairwise(edges))
    curve = Curve("Flow loss by time (1 is noise)", "time t", "loss", centres, estimates)
    record = {"samples": len(table), "time_bins": bins, "share_of_training_times": shares.tolist()}
    return Found(measures, curves=[curve], record=record, outcomes={"flow_loss": Outcomes(whole.tolist())})


def _losses(context: Context, stream: StreamConfig, plan: Plan, what: str) -> Floats:
    settings, pipeline = context.settings, context.pipeline
    loader = ValidationLoader(
        stream, plan, pipeline.caption_tokenizer, samples=settings.loss_samples, batch_size=pipeline.max_batch
    )
    tables = []
    for part in loss_table(pipeline, loader, seed=settings.seed, bins=settings.time_bins):
        tables.append(part)
        context.progress(what, len(tables), len(loader))
    table = torch.cat(tables)
    require_reference(len(table))
    return table.numpy()


def _of_training(context: Context, shares: Floats) -> list[Measure]:
    """Measure the loss on training images, if they are not the held-out ones."""
    stream, plan = context.real.train_stream, context.real.train_plan
    if stream is None or plan is None or stream.sources == context.real.reference_stream.sources:
        return []
    table = _losses(context, stream, plan, "flow loss of training images")
    about = "The same on training images: far below the held-out loss if the model has memorized them."
    return [Measure("flow_loss_of_training", context.settings.bootstrap.mean(table @ shares), "none", about=about)]


def _against_others(real: RealData, weights: str, whole: Floats, bootstrap: Bootstrap) -> list[Measure]:
    """Compare with the weights measured before, sample by sample: noise and times are the same."""
    about = "Difference of the flow loss, sample by sample; below 0: these weights are better."
    earlier = real.once("flow_losses", dict)
    found = [
        Measure(f"flow_loss_minus_{name}", bootstrap.mean(whole - other), "lower", about=about)
        for name, other in earlier.items()
    ]
    earlier[weights] = whole
    return found
