"""An autoencoder's evaluation: reconstruction, equivariance, latents, and the distance of what it gives back.

Shapes: image (B,3,H,W); features (N,D).
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.autoencoding.perceptual import perceptual_distance, require_perceptual
from hdm_lightning.autoencoding.transforms import QuarterTurn, Scale, Transform, exact_scales
from hdm_lightning.data.config import StreamConfig
from hdm_lightning.data.plan import Plan
from hdm_lightning.encoders.padding import cut_to, pad_to_multiple, padded_size
from hdm_lightning.encoders.vae_folder import locate_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.evaluate_model import Outcome
from hdm_lightning.evaluation.image_sets import Captioned, Progress, middle_crops, pixels, real_images
from hdm_lightning.evaluation.request import VaeRequest
from hdm_lightning.evaluation.results import Better, Evaluation, Found, Gallery, Group, LeftOut, Measure
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.generation.fingerprints import sha256_of_all
from hdm_lightning.generation.pipeline import to_uint8
from hdm_lightning.metrics.autoencoder_quality import AutoencoderMeasures
from hdm_lightning.metrics.autoencoder_sheet import sheet
from hdm_lightning.metrics.distances import FEWEST_SAMPLES, frechet_estimate, frechet_needs, kernel_distance_estimate
from hdm_lightning.metrics.features import FeatureNetwork, frechet_name, kernel_name, with_names_apart
from hdm_lightning.metrics.image_quality import SMALLEST_SIDE
from hdm_lightning.training import hardware
from hdm_lightning.training.callbacks.vae_validation import measures_of
from hdm_lightning.training.data_settings import sources_from
from hdm_lightning.training.vae.network import AutoencoderNetwork, load_vae

WEIGHTS = "vae"
FINAL = "final"
TITLES = {"autoencoder": "Reconstruction and equivariance", "distances": "Distance of reconstructions"}
_SHOWN = 6
_SHEET_PX = 1100
_HIGHER = ("psnr", "ssim")


@dataclasses.dataclass
class _Measured:
    """What one pass over the images leaves: measures, their values by image, and features by network."""

    measures: AutoencoderMeasures
    values: dict[str, Tensor]
    real: dict[str, Tensor]
    decoded: dict[str, Tensor]
    first: Tensor


def evaluate_vae(request: VaeRequest, device: torch.device, progress: Progress) -> Evaluation:
    """Evaluate an autoencoder on held-out images.

    Raises:
        UserError: a folder, network or size that cannot be used.
    """
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
    images = (part for batch in real_images(stream, plan, request.samples) for part in _split(batch, request))
    measured = _measure(request, device, network, networks, images, progress)
    outcome = Outcome({WEIGHTS: {"autoencoder": _own(request, network, measured)}})
    try:
        outcome.results[WEIGHTS]["distances"] = _distances(request, networks, measured, outcome.left_out)
    except Exception as error:  # must not cost the other part, which may have taken hours
        outcome.fail("distances", WEIGHTS, error)
    facts = {"name": named.name if named.name != FINAL else named.parent.name, "model": str(named)}
    facts |= {"sha256": sha256_of_all(sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]))}
    facts |= {"latents": f"{network.channels} channels, 1/{network.factor} of the side"}
    return outcome.evaluation(facts, _pinned(request, networks, plan.fingerprint), TITLES, time.monotonic() - begin)


def _check_side(request: VaeRequest, factor: int) -> None:
    if request.size % factor and request.on_indivisible == "refuse":
        nearest = max(1, round(request.size / factor)) * factor
        hint = f"give {nearest}, or add --on-indivisible pad"
        raise UserError(f"{request.size} is no multiple of {factor}", where="--size", hint=hint)
    if request.size < SMALLEST_SIDE:
        what = f"{request.size} px are too few to measure"
        raise UserError(what, where="--size", hint=f"give at least {SMALLEST_SIDE}")


def _split(batch: Captioned, request: VaeRequest) -> Sequence[Tensor]:
    return batch.images.split(request.batch)


@torch.no_grad()
def _measure(
    request: VaeRequest,
    device: torch.device,
    network: AutoencoderNetwork,
    networks: Sequence[FeatureNetwork],
    images: Iterator[Tensor],
    progress: Progress,
) -> _Measured:
    """One pass over batches of uint8 images."""
    name = request.perceptual
    perceptual = None if name == "none" else (name, perceptual_distance(name, where="--perceptual").to(device))
    measures = measures_of(network, padded_size(request.size, 1, network.factor)[0], perceptual)
    tables: list[dict[str, Tensor]] = []
    first: list[Tensor] = []
    done = 0
    for part in images:
        height, width = part.shape[-2:]
        padded = pad_to_multiple(part, network.factor, request.on_indivisible)
        image = padded.to(device).float() / 127.5 - 1.0
        values = measures.update(image, cut=(height, width))
        back = cut_to(to_uint8(network.decode(network.posterior(image).mean)).cpu(), height, width)
        tables.append({f"value/{key}": value.cpu() for key, value in values.items()})
        tables[-1] |= {f"real/{one.name}": one(part).cpu() for one in networks}
        tables[-1] |= {f"decoded/{one.name}": one(back).cpu() for one in networks}
        first = first or [image[:_SHOWN]]
        done += len(part)
        progress("autoencoder", done, request.samples)
    if done < 2:
        raise UserError(f"there are {done} usable images, two are needed", where="--data", hint="give more")
    columns = {
        kind: {
            key.removeprefix(f"{kind}/"): torch.cat([table[key] for table in tables])
            for key in tables[0]
            if key.startswith(f"{kind}/")
        }
        for kind in ("value", "real", "decoded")
    }
    return _Measured(measures, columns["value"], columns["real"], columns["decoded"], first[0])


def _own(request: VaeRequest, network: AutoencoderNetwork, measured: _Measured) -> Found:
    """Means of what each image has for itself, and in the record the statistics of all latents together.

    Those no single image has, and no resampling of images spreads. `latents_mean` and `latents_std`, per channel, are
    what training wants to find in an autoencoder's config.json.
    """
    measures = [
        Measure(key.replace("/", "_"), request.bootstrap.mean(value), _better(key), "dB" * ("_db" in key))
        for key, value in measured.values.items()
    ]
    report, latents = measured.measures.report(), measured.measures.latent_report()
    record: dict[str, Any] = {"resolution": request.size}
    record["perceptual"] = None if request.perceptual == "none" else request.perceptual
    record |= {key: round(value, 6) for key, value in report.items() if key not in measured.values}
    record |= {"latents_mean": list(latents.mean), "latents_std": list(latents.std)}
    return Found(measures, galleries=[_gallery(network, measured.first)], record=record)


def _better(key: str) -> Better:
    return "higher" if any(word in key for word in _HIGHER) else "lower"


def _distances(
    request: VaeRequest, networks: Sequence[FeatureNetwork], measured: _Measured, left_out: list[LeftOut]
) -> Found:
    """Fréchet distances of reconstructions to the same images (rFID where the network is Inception).

    Those that need more images are added to `left_out`.
    """
    measures = []
    for network in networks:
        real, decoded = measured.real[network.name], measured.decoded[network.name]
        half, needed = len(real) // 2, frechet_needs(network.width)
        if half >= FEWEST_SAMPLES:
            kernel = kernel_distance_estimate(real[half:], decoded[:half], request.bootstrap)
            about = f"Kernel distance on {network.name} of one half's reconstructions to the other half; unbiased."
            measures.append(Measure(kernel_name(network), kernel, "lower", about=about))
        if len(real) < needed:
            why = f"a Fréchet distance on {network.width} features needs {needed} images, there are {len(real)}"
            hint = f"give more images, or rely on {kernel_name(network)}"
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
    title = f"A column an image: itself, reconstruction, latent; then {how}: itself, decoded, both latents"
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
