"""Parts that compare generated images with real ones as sets: Fréchet and kernel distance, neighbors.

Shapes: features (N,D).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.context import Context, feature_networks, needs
from hdm_lightning.evaluation.findings import Found, Gallery, Group, Measure, Outcomes
from hdm_lightning.evaluation.image_sets import pixels
from hdm_lightning.metrics.distances import (
    CMMD_SCALE,
    FEWEST_SAMPLES,
    frechet_estimate,
    frechet_floor,
    frechet_needs,
    gaussian_kernel,
    kernel_contributions,
    kernel_distance_estimate,
    kernel_floor,
)
from hdm_lightning.metrics.features import FeatureNetwork, frechet_name, kernel_name
from hdm_lightning.metrics.neighbours import MOST_SAMPLES, NEIGHBOURS, neighbour_estimates

_NEIGHBOURS_ABOUT = {
    "precision": "Share of generated images in the neighborhood of a real one: quality.",
    "recall": "Share of real images in the neighborhood of a generated one: variety.",
    "density": "Mean number of real neighborhoods around a generated image, over k; about 1 for real ones, or more.",
    "coverage": "Share of real images whose neighborhood contains a generated one: variety.",
}
_HALVES = "Score of real images: the same for one half of them against the other."
_FLOOR = "Floor: the same between images of the reference's own distribution, at these counts, with its range."
_CMMD = "CMMD: kernel distance (Gaussian kernel, σ = 10)"
_BEHIND = "Floor: the same for real images that the autoencoder encoded and decoded."


def frechet_counts(context: Context) -> None:
    """Require enough samples for the Fréchet distance of every network."""
    have, reference = context.settings.samples, context.real.reference_count
    for network in context.real.networks:
        needed = frechet_needs(network.width)
        if min(have, reference) < needed:
            side = f"{reference} reference images" if reference < have else f"{have} samples"
            more = "--data with more images and " if reference < needed else ""
            raise UserError(
                f"a Fréchet distance on the {network.width} features of {network.name} needs at least {needed} images"
                f" of each kind, there are {side}",
                where="--samples",
                hint=f"pass {more}--samples {needed}, or rely on {kernel_name(network)}, which needs only 2",
            )


@needs(feature_networks, frechet_counts)
def frechet(context: Context) -> Found:
    """Measure the Fréchet distance on every network."""
    _ = context.real.reference
    frechet_counts(context)  # again: the number of readable reference images is known only now
    measures, bootstrap = [], context.settings.set_bootstrap
    for network in context.real.networks:
        name, (real, drawn) = frechet_name(network), context.features(network)
        estimate = frechet_estimate(real, drawn, bootstrap)
        about = (
            f"Fréchet distance on {network.width} features of {network.name}, each set as one Gaussian; "
            "biased upward at small counts."
        )
        measures.append(Measure(name, estimate, "lower", about=about))
        floor = context.real.once(f"{name}_floor", frechet_floor, real, len(drawn), bootstrap)
        measures.append(Measure(f"{name}_floor", floor, "none", about=_FLOOR))
        decoded = context.real.decoded.features[network.name].to(network.device)
        if len(decoded) == len(real):
            own = f"{name}_of_autoencoder"
            behind = context.real.once(own, frechet_estimate, real, decoded, bootstrap, paired=True)
            measures.append(Measure(own, behind, "none", about=_BEHIND))
    return Found(measures, record=_record(context))


@needs(feature_networks)
def kernel(context: Context) -> Found:
    """Measure the kernel distance on every network with its floors, and CMMD if there is a CLIP."""
    measures: list[Measure] = []
    outcomes = {}
    for network in context.real.networks:
        measures += _kernel_of(context, network)
        real, drawn = context.features(network)
        contributions = kernel_contributions(real, drawn, matched=len(real) == len(drawn)).cpu()
        outcomes[kernel_name(network)] = Outcomes(contributions.tolist())
    if clip := context.real.clip:
        real, drawn = (images.features[clip.network.name] for images in (context.real.reference, context.drawn))
        about = f"{_CMMD} on features of the CLIP {clip.name}, times 1000; unbiased."
        name, options = f"cmmd_{clip.name}", {"kernel": gaussian_kernel, "scale": CMMD_SCALE}
        measures += _with_floor(context, name, real, drawn, about, **options)
    return Found(measures, galleries=[_side_by_side(context)], record=_record(context), outcomes=outcomes)


def _kernel_of(context: Context, network: FeatureNetwork) -> list[Measure]:
    """Measure the distance on one network, with its floor, and that of decoded images."""
    name, bootstrap = kernel_name(network), context.settings.bootstrap
    real, drawn = context.features(network)
    about = f"Kernel distance (cubic kernel) on {network.width} features of {network.name}; unbiased."
    measures = _with_floor(context, name, real, drawn, about)
    behind = context.real.decoded.features[network.name].to(network.device)
    half = min(len(real), len(behind)) // 2
    if half >= FEWEST_SAMPLES:
        own = f"{name}_of_autoencoder"
        of_halves = context.real.once(own, kernel_distance_estimate, real[half:], behind[:half], bootstrap)
        measures.append(Measure(own, of_halves, "none", about=_BEHIND))
    return measures


def _with_floor(context: Context, name: str, real: Tensor, drawn: Tensor, about: str, **options: Any) -> list[Measure]:
    """Measure a kernel distance, and its floor: the reference against itself."""
    bootstrap = context.settings.bootstrap
    estimate = kernel_distance_estimate(real, drawn, bootstrap, matched=len(real) == len(drawn), **options)
    floor = context.real.once(f"{name}_floor", kernel_floor, real, len(drawn), bootstrap, **options)
    return [Measure(name, estimate, "lower", about=about), Measure(f"{name}_floor", floor, "none", about=_FLOOR)]


def _side_by_side(context: Context) -> Gallery:
    """Return a gallery of the first generated images, each beside the real image whose caption it has."""
    drawn, real = context.drawn, context.real.reference
    shown = zip(drawn.captions, drawn.whole, real.whole, strict=False)
    groups = tuple(Group(caption, {"drawn": pixels(one), "real": pixels(other)}) for caption, one, other in shown)
    return Gallery("The first generated images, beside the real ones of the same captions", groups)


def _record(context: Context) -> Mapping[str, object]:
    return {
        "drawn": len(context.drawn),
        "real": len(context.real.reference),
        "networks": [network.name for network in context.real.all_networks],
    }


def neighbour_counts(context: Context) -> None:
    """Require enough images for each to have neighbors."""
    fewest = min(context.settings.samples, context.real.reference_count)
    if fewest <= NEIGHBOURS:
        raise UserError(
            f"{NEIGHBOURS} neighbors need more than {NEIGHBOURS} images of each kind, there are {fewest}",
            where="--samples",
            hint=f"pass --samples {10 * NEIGHBOURS} and as many reference images",
        )


@needs(feature_networks, neighbour_counts)
def neighbours(context: Context) -> Found:
    """Measure precision, recall, density and coverage on the first network."""
    _ = context.real.reference
    neighbour_counts(context)  # again: the number of readable reference images is known only now
    real, drawn = context.features(context.network)
    bootstrap, half = context.settings.set_bootstrap, len(real) // 2
    found = neighbour_estimates(real, drawn, bootstrap)
    measures = [Measure(name, estimate, "higher", about=_NEIGHBOURS_ABOUT[name]) for name, estimate in found.items()]
    if half > NEIGHBOURS:
        halves = context.real.once("neighbours_of_real", neighbour_estimates, real[:half], real[half:], bootstrap)
        for name, estimate in halves.items():
            measures.append(Measure(f"{name}_of_real", estimate, "none", about=_HALVES))
    record = {"network": context.network.name, "neighbours": NEIGHBOURS, "most_samples": MOST_SAMPLES}
    return Found(measures, record=record)
