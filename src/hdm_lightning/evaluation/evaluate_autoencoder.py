"""Evaluation of an autoencoder: reconstruction, equivariance, latents, and distances of its reconstructions.

Shapes: image (B,3,H,W); features (N,D).
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.autoencoding.perceptual import perceptual_distance, require_perceptual
from hdm_lightning.autoencoding.transforms import QuarterTurn, Scale, Transform, exact_scales
from hdm_lightning.data.rules import StreamConfig, sources_from
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.encoders.autoencoder import cut_to, pad_to_multiple, padded_size
from hdm_lightning.encoders.pretrained import FINAL
from hdm_lightning.encoders.vae_folder import locate_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.findings import Evaluation, Found, Gallery, Group, LeftOut, Measure
from hdm_lightning.evaluation.image_sets import Progress, middle_crops, pixels, real_images
from hdm_lightning.evaluation.request import VaeRequest
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.generation.image_files import sha256_of, to_uint8
from hdm_lightning.metrics.autoencoder_quality import SMALLEST_SIDE, AutoencoderMeasures
from hdm_lightning.metrics.distances import FEWEST_SAMPLES, frechet_estimate, frechet_needs, kernel_distance_estimate
from hdm_lightning.metrics.features import FeatureNetwork, frechet_name, kernel_name, with_names_apart
from hdm_lightning.metrics.latents import sheet
from hdm_lightning.training import hardware
from hdm_lightning.training.callbacks.autoencoder_report import measures_of
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork, load_vae

WEIGHTS = "vae"
TITLES = {"autoencoder": "Reconstruction and equivariance", "distances": "Distance of reconstructions"}
_SHOWN = 6
_SHEET_PX = 1100
_HIGHER = ("psnr", "ssim")


Columns = dict[tuple[str, str], Tensor]
"""Results of one pass over all images: ("value", measure) (N,); ("real" | "decoded", network) features (N,D)."""


def evaluate_vae(request: VaeRequest, device: torch.device, progress: Progress) -> Evaluation:
    """Evaluate an autoencoder on held-out images. Raises UserError: a folder, network or size is unusable."""
    begin = time.monotonic()
    named = request.folder / FINAL if (request.folder / FINAL).is_dir() else request.folder
    folder = locate_autoencoder(str(named), where="FOLDER")
    network = AutoencoderNetwork(load_vae(str(folder)), train_encoder=False).eval().requires_grad_(False).to(device)
    _check_side(request, network.factor)
    if request.perceptual != "none":
        require_perceptual(request.perceptual, where="--perceptual")
    networks = with_names_apart([load_feature_network(name, device) for name in dict.fromkeys(request.features)])
    stream = StreamConfig(sources_from(list(request.data), "--data"), request.size, 1, stage="validation")
    stream = middle_crops(
        dataclasses.replace(stream, captions=dataclasses.replace(stream.captions, allow_missing=True))
    )
    plan = Plan(stream)
    plan.require_images("--data")
    found = Evaluation(
        _facts(named, folder, network), _pinned(request, networks, plan.fingerprint), {WEIGHTS: {}}, TITLES
    )
    name = request.perceptual
    perceptual = None if name == "none" else (name, perceptual_distance(name, where="--perceptual").to(device))
    measures = measures_of(network, padded_size(request.size, 1, network.factor)[0], perceptual)
    batches = (part for each in real_images(stream, plan, request.samples) for part in each.images.split(request.batch))
    columns, first = _measure(request, network, networks, measures, batches, progress)
    found.results[WEIGHTS]["autoencoder"] = _own(request, measures, columns, _gallery(network, first))
    try:
        found.results[WEIGHTS]["distances"] = _distances(request, networks, columns, found.left_out)
    except Exception as error:  # must not lose the other part, which may have taken hours
        found.fail("distances", WEIGHTS, error)
    found.seconds = time.monotonic() - begin
    return found


def _facts(named: Path, folder: Path, network: AutoencoderNetwork) -> dict[str, str]:
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return {
        "name": named.name if named.name != FINAL else named.parent.name,
        "model": str(named),
        "sha256": sha256_of(*weights),
        "latents": f"{network.channels} channels, 1/{network.factor} of the side",
    }


def _check_side(request: VaeRequest, factor: int) -> None:
    if request.size % factor and request.on_indivisible == "refuse":
        nearest = max(1, round(request.size / factor)) * factor
        hint = f"use {nearest}, or add --on-indivisible pad"
        raise UserError(f"{request.size} is not a multiple of {factor}", where="--size", hint=hint)
    if request.size < SMALLEST_SIDE:
        what = f"{request.size} px are too few to measure"
        raise UserError(what, where="--size", hint=f"use at least {SMALLEST_SIDE}")


@torch.no_grad()
def _measure(
    request: VaeRequest,
    network: AutoencoderNetwork,
    networks: Sequence[FeatureNetwork],
    measures: AutoencoderMeasures,
    batches: Iterator[Tensor],
    progress: Progress,
) -> tuple[Columns, Tensor]:
    """Measure batches of uint8 images in one pass; return the columns, and the first images in [-1, 1]."""
    parts: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    first: list[Tensor] = []
    done = 0
    for batch in batches:
        height, width = batch.shape[-2:]
        padded = pad_to_multiple(batch, network.factor, request.on_indivisible)
        image = padded.to(next(network.parameters()).device).float() / 127.5 - 1.0
        for key, value in measures.update(image, cut=(height, width)).items():
            parts["value", key].append(value.cpu())
        back = cut_to(to_uint8(network.decode(network.posterior(image).mean)).cpu(), height, width)
        for one in networks:
            parts["real", one.name].append(one(batch).cpu())
            parts["decoded", one.name].append(one(back).cpu())
        first = first or [image[:_SHOWN]]
        done += len(batch)
        progress("autoencoder", done, request.samples)
    if done < 2:
        raise UserError(f"found {done} usable images, two are needed", where="--data", hint="pass more images")
    return {key: torch.cat(each) for key, each in parts.items()}, first[0]


def _own(request: VaeRequest, measures: AutoencoderMeasures, columns: Columns, gallery: Gallery) -> Found:
    """Return the means of what is measured per image, with the statistics of all latents together in the record.

    The latter do not exist per image, so they have no interval from resampling. `latents_mean` and `latents_std`, per
    channel, are what training expects in an autoencoder's config.json.
    """
    values = {name: column for (kind, name), column in columns.items() if kind == "value"}
    means = [
        Measure(
            key.replace("/", "_"),
            request.bootstrap.mean(value),
            "higher" if any(word in key for word in _HIGHER) else "lower",
            unit="dB" if "_db" in key else "",
        )
        for key, value in values.items()
    ]
    latents = measures.latent_report()
    record: dict[str, Any] = {"resolution": request.size}
    record["perceptual"] = None if request.perceptual == "none" else request.perceptual
    record |= {key: round(value, 6) for key, value in measures.report().items() if key not in values}
    record |= {"latents_mean": list(latents.mean), "latents_std": list(latents.std)}
    return Found(means, galleries=[gallery], record=record)


def _distances(
    request: VaeRequest, networks: Sequence[FeatureNetwork], columns: Columns, left_out: list[LeftOut]
) -> Found:
    """Measure Fréchet distances of reconstructions to the same images (rFID if the network is Inception).

    Those that need more images are added to `left_out`.
    """
    measures = []
    for network in networks:
        real, decoded = columns["real", network.name], columns["decoded", network.name]
        half, needed = len(real) // 2, frechet_needs(network.width)
        if half >= FEWEST_SAMPLES:
            kernel = kernel_distance_estimate(real[half:], decoded[:half], request.bootstrap)
            about = f"Kernel distance on {network.name} of one half's reconstructions to the other half; unbiased."
            measures.append(Measure(kernel_name(network), kernel, "lower", about=about))
        if len(real) < needed:
            why = f"a Fréchet distance on {network.width} features needs {needed} images, there are {len(real)}"
            hint = f"pass more images, or rely on {kernel_name(network)}"
            left_out.append(LeftOut(f"r{frechet_name(network)}", why, hint))
            continue
        sets = real.to(network.device), decoded.to(network.device)
        estimate = frechet_estimate(*sets, request.set_bootstrap, paired=True)
        about = f"Fréchet distance on {network.name} of reconstructions to the same images."
        measures.append(Measure(f"r{frechet_name(network)}", estimate, "lower", about=about))
    return Found(measures)


@torch.no_grad()
def _gallery(network: AutoencoderNetwork, first: Tensor) -> Gallery:
    halves = exact_scales(first.shape[-1] // network.factor, (1,), 2)
    moved: list[Transform] = [QuarterTurn(1), *(Scale.uniform(half) for half in halves)]
    rows = sheet(lambda x: network.posterior(x).mean, network.decode, first, moved, network.factor)
    how = "turned and halved" if halves else "turned"
    title = f"One column per image: itself, reconstruction, latent; then {how}: itself, decoded, both latents"
    return Gallery(title, (Group("", {"sheet": pixels(to_uint8(rows * 2 - 1))}),), largest_px=_SHEET_PX)


def _pinned(request: VaeRequest, networks: Sequence[FeatureNetwork], order: str) -> dict[str, Any]:
    return {
        "samples": request.samples,
        "seed": request.seed,
        "bootstrap": dataclasses.asdict(request.bootstrap),
        "set_resamples": request.set_resamples,
        "networks": [network.to_json() for network in networks],
        "data": {
            "sources": list(request.data),
            "resolution": request.size,
            "on_indivisible": request.on_indivisible,
            "order": order,
        },
        "environment": hardware.environment(),
    }
