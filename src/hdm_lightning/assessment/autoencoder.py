"""An autoencoder's evaluation: reconstruction, equivariance, latents, and the distance of what it gives back.

Shapes: image (B,3,H,W); features (N,D).
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.assessment.context import Progress
from hdm_lightning.assessment.part import failure
from hdm_lightning.assessment.pictures import Captioned, as_picture, middle_crops, real_pictures
from hdm_lightning.assessment.settings import EvaluationSettings
from hdm_lightning.autoencoding.perceptual import perceptual_distance, require_perceptual
from hdm_lightning.autoencoding.transforms import QuarterTurn, Scale, Transform, exact_scales
from hdm_lightning.data.config import StreamConfig
from hdm_lightning.data.plan import Plan
from hdm_lightning.encoders.autoencoder_folder import locate_autoencoder
from hdm_lightning.encoders.padding import OnIndivisible, cut_to, pad_to_multiple, padded_size
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.autoencoder_measures import SMALLEST_SIDE, AutoencoderMeasures
from hdm_lightning.evaluation.autoencoder_pictures import sheet
from hdm_lightning.evaluation.bootstrap import Bootstrap
from hdm_lightning.evaluation.features import FeatureNetwork, with_names_apart
from hdm_lightning.evaluation.frechet import frechet_estimate, frechet_needs
from hdm_lightning.evaluation.kernel_distance import kernel_distance_estimate
from hdm_lightning.evaluation.network_names import DEFAULT_NETWORK, frechet_name, kernel_name
from hdm_lightning.evaluation.results import Better, Evaluation, Failed, Gallery, LeftOut, Measure, PartResult
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.generation.image_files import sha256_of, to_uint8
from hdm_lightning.training import hardware
from hdm_lightning.training.callbacks.vae_validation import measures_of
from hdm_lightning.training.data_settings import sources_from
from hdm_lightning.training.vae.network import AutoencoderNetwork, load_vae

WEIGHTS = "vae"
FINAL = "final"
_SHOWN = 6
_HIGHER = ("psnr", "ssim")


@dataclasses.dataclass(frozen=True)
class VaeRequest:
    """What to evaluate and how.

    Attributes:
        folder: a diffusers AutoencoderKL's, or a run of hdm-train-vae.
        data: folders of shards with pictures that it was not trained on.
        resolution: side of the middle squares in pixels.
        settings: `samples`, `features`, resampling and the seed count here.
        perceptual: name of a perceptual distance, or None.
        device: where to compute.
        batch: pictures at once.
        on_indivisible: a resolution that the autoencoder's factor does not divide: refuse it, or pad the pictures by
            mirroring their edges, and compare on what they were.
    """

    folder: Path
    data: tuple[str, ...]
    resolution: int = 256
    settings: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    perceptual: str | None = DEFAULT_NETWORK
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    batch: int = 16
    on_indivisible: OnIndivisible = "refuse"


@dataclasses.dataclass
class _Measured:
    """What one pass over the pictures leaves."""

    measures: AutoencoderMeasures
    values: dict[str, Tensor]
    real: dict[str, Tensor]
    decoded: dict[str, Tensor]
    first: Tensor


def evaluate_vae(request: VaeRequest, progress: Progress) -> Evaluation:
    """Evaluate an autoencoder on held-out pictures.

    Raises:
        UserError: a folder, network or size that cannot be used.
    """
    begin = time.monotonic()
    named = request.folder / FINAL if (request.folder / FINAL).is_dir() else request.folder
    folder = locate_autoencoder(str(named), where="FOLDER")
    network = AutoencoderNetwork(load_vae(str(folder)), train_encoder=False).eval().requires_grad_(False)
    network.to(request.device)
    _check_side(request, network.factor)
    if request.perceptual is not None:
        require_perceptual(request.perceptual, where="--perceptual")
    loaded = [load_feature_network(name, request.device) for name in dict.fromkeys(request.settings.features)]
    networks = with_names_apart(loaded)
    stream = StreamConfig(sources_from(list(request.data), "--data"), request.resolution, 1, stage="validation")
    stream = middle_crops(
        dataclasses.replace(stream, captions=dataclasses.replace(stream.captions, allow_missing=True))
    )
    plan = Plan(stream)
    measured = _measure(request, network, networks, real_pictures(stream, plan, request.settings.samples), progress)
    left_out: list[LeftOut] = []
    failed: list[Failed] = []
    try:
        results = [_distances(request.settings, networks, measured, left_out)]
    except Exception as error:  # must not cost the other part, which may have taken hours
        results, failed = [], [failure("distances", WEIGHTS, error)]
    own = PartResult(
        "autoencoder",
        "Reconstruction and equivariance",
        _means(measured, request.settings.bootstrap),
        galleries=[_gallery(network, measured.first)],
        record={"resolution": request.resolution, "perceptual": request.perceptual, **_of_the_set(measured)},
    )
    facts = {"name": named.name if named.name != FINAL else named.parent.name, "model": str(named)}
    facts |= {"sha256": sha256_of(*sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]))}
    facts |= {"latents": f"{network.channels} channels, 1/{network.factor} of the side"}
    settings = _pinned(request, networks, plan.fingerprint)
    return Evaluation(facts, settings, {WEIGHTS: [own, *results]}, left_out, time.monotonic() - begin, failed)


def _check_side(request: VaeRequest, factor: int) -> None:
    if request.resolution % factor and request.on_indivisible == "refuse":
        nearest = max(1, round(request.resolution / factor)) * factor
        hint = f"give {nearest}, or add --on-indivisible pad"
        raise UserError(f"{request.resolution} is no multiple of {factor}", where="--size", hint=hint)
    if request.resolution < SMALLEST_SIDE:
        what = f"{request.resolution} px are too few to measure"
        raise UserError(what, where="--size", hint=f"give at least {SMALLEST_SIDE}")


def _measure(
    request: VaeRequest,
    network: AutoencoderNetwork,
    networks: Sequence[FeatureNetwork],
    batches: Iterator[Captioned],
    progress: Progress,
) -> _Measured:
    name = request.perceptual
    perceptual = (name, perceptual_distance(name, where="--perceptual").to(request.device)) if name else None
    measures = measures_of(network, padded_size(request.resolution, 1, network.factor)[0], perceptual)
    values: dict[str, list[Tensor]] = {}
    real: dict[str, list[Tensor]] = {one.name: [] for one in networks}
    decoded: dict[str, list[Tensor]] = {one.name: [] for one in networks}
    first: Tensor | None = None
    done = 0
    for part in (part for batch in batches for part in batch.images.split(request.batch)):
        height, width = part.shape[-2:]
        padded = pad_to_multiple(part, network.factor, request.on_indivisible)
        image = padded.to(request.device).float() / 127.5 - 1.0
        for key, value in measures.update(image, cut=(height, width)).items():
            values.setdefault(key, []).append(value.cpu())
        back = cut_to(_given_back(network, image), height, width)
        for one in networks:
            real[one.name].append(one(part).cpu())
            decoded[one.name].append(one(back).cpu())
        first = image[:_SHOWN] if first is None else first
        done += len(part)
        progress("autoencoder", done, request.settings.samples)
    if first is None or done < 2:
        raise UserError(f"there are {done} usable pictures, two are needed", where="--data", hint="give more")
    return _Measured(measures, _joined(values), _joined(real), _joined(decoded), first)


def _joined(table: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat(parts) for key, parts in table.items()}


@torch.no_grad()
def _given_back(network: AutoencoderNetwork, image: Tensor) -> Tensor:
    return to_uint8(network.decode(network.posterior(image).mean)).cpu()


def _means(measured: _Measured, bootstrap: Bootstrap) -> list[Measure]:
    return [
        Measure(key.replace("/", "_"), bootstrap.mean(value), _better(key), "dB" if "_db" in key else "")
        for key, value in measured.values.items()
    ]


def _better(key: str) -> Better:
    return "higher" if any(word in key for word in _HIGHER) else "lower"


def _of_the_set(measured: _Measured) -> dict[str, Any]:
    """Statistics of all latents together, which no single picture has and no resampling of pictures spreads.

    `latents_mean` and `latents_std`, per channel, are what training wants to find in an autoencoder's config.json.
    """
    found, latents = measured.measures.report(), measured.measures.latent_report()
    once = {key: round(value, 6) for key, value in found.items() if key not in measured.values}
    return {**once, "latents_mean": list(latents.mean), "latents_std": list(latents.std)}


def _distances(
    settings: EvaluationSettings, networks: Sequence[FeatureNetwork], measured: _Measured, left_out: list[LeftOut]
) -> PartResult:
    """Fréchet distances of reconstructions to the same pictures (rFID where the network is Inception).

    Those that need more pictures are added to `left_out`.
    """
    measures = []
    for network in networks:
        real, decoded = measured.real[network.name], measured.decoded[network.name]
        half = len(real) // 2
        kernel = kernel_distance_estimate(real[half:], decoded[:half], settings.bootstrap) if half >= 2 else None
        if kernel is not None:
            about = f"Kernel distance on {network.name} of one half's reconstructions to the other half; unbiased."
            measures.append(Measure(kernel_name(network), kernel, "lower", about=about))
        needed = frechet_needs(network.width)
        if len(real) < needed:
            why = f"a Fréchet distance on {network.width} features needs {needed} pictures, there are {len(real)}"
            hint = f"give more pictures, or rely on {kernel_name(network)}"
            left_out.append(LeftOut(f"r{frechet_name(network)}", why, hint))
            continue
        on = network.device
        estimate = frechet_estimate(real.to(on), decoded.to(on), settings.set_bootstrap, paired=True)
        about = f"Fréchet distance on {network.name} of reconstructions to the same pictures."
        measures.append(Measure(f"r{frechet_name(network)}", estimate, "lower", about=about))
    return PartResult("distances", "Distance of reconstructions", measures)


@torch.no_grad()
def _gallery(network: AutoencoderNetwork, first: Tensor) -> Gallery:
    halves = exact_scales(first.shape[-1] // network.factor, (1,), 2)
    moved: list[Transform] = [QuarterTurn(1), *(Scale.uniform(half) for half in halves)]
    rows = sheet(lambda x: network.posterior(x).mean, network.decode, first, moved, network.factor)
    picture = as_picture(to_uint8(rows * 2 - 1))
    how = "turned and halved" if halves else "turned"
    title = f"A column a picture: itself, reconstruction, latent; then {how}: itself, decoded, both latents"
    return Gallery(title, (picture,), ("",), 1)


def _pinned(request: VaeRequest, networks: Sequence[FeatureNetwork], order: str) -> dict[str, Any]:
    settings = request.settings
    return {
        "samples": settings.samples,
        "seed": settings.seed,
        "bootstrap": dataclasses.asdict(settings.bootstrap),
        "set_resamples": settings.set_resamples,
        "networks": [network.to_json() for network in networks],
        "data": {
            "sources": list(request.data),
            "resolution": request.resolution,
            "on_indivisible": request.on_indivisible,
            "order": order,
        },
        "environment": hardware.environment(),
    }
