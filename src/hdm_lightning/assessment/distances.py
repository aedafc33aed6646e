"""Part `distances`: how far the drawn pictures' distribution is from the real one's, on named features."""

from torch import Tensor

from hdm_lightning.assessment.context import Context
from hdm_lightning.assessment.part import Part, check_networks
from hdm_lightning.assessment.pictures import as_picture
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.results import Gallery, Measure, PartResult
from hdm_lightning.metrics.bootstrap import Bootstrap
from hdm_lightning.metrics.distances import (
    CMMD_SCALE,
    frechet_estimate,
    frechet_needs,
    gaussian_kernel,
    kernel_distance_estimate,
)
from hdm_lightning.metrics.features import FeatureNetwork, frechet_name, kernel_name


def check_frechet(context: Context) -> None:
    """The Fréchet distance of every network has the samples it needs.

    Raises:
        UserError: saying how many are missing, and what works with those there are.
    """
    context.data.require_networks()
    have, reference = context.settings.samples, context.data.reference_count
    for network in context.data.networks:
        needed = frechet_needs(network.width)
        if min(have, reference) < needed:
            side = f"{reference} reference pictures" if reference < have else f"{have} samples"
            more = "--data with more pictures and " if reference < needed else ""
            raise UserError(
                f"a Fréchet distance on the {network.width} features of {network.name} needs at least {needed} pictures"
                f" of each kind, there are {side}",
                where="--samples",
                hint=f"give {more}--samples {needed}, or rely on {kernel_name(network)}, which works from 2 on",
            )


def _frechet(context: Context) -> PartResult:
    reference, measures = context.data.reference, []
    check_frechet(context)  # again: now it is known how many of the reference pictures can be read
    for network in context.data.networks:
        real, drawn = reference.features[network.name], context.drawn.features[network.name]
        estimate = frechet_estimate(_on(network, real), _on(network, drawn), context.settings.set_bootstrap)
        about = (
            f"Fréchet distance of {network.width} features of {network.name}, each set as one Gaussian; "
            "biased upwards at small counts."
        )
        measures.append(Measure(frechet_name(network), estimate, "lower", about=about))
    return PartResult("frechet", FRECHET.title, measures, record=_record(context))


def _kernel(context: Context) -> PartResult:
    measures, bootstrap = [], context.settings.bootstrap
    decoded = context.data.decoded(context.pipeline)
    for network in context.data.networks:
        real = _on(network, context.data.reference.features[network.name])
        about = f"Kernel distance (cubic kernel) on {network.width} features of {network.name}; unbiased."
        found = kernel_distance_estimate(real, _on(network, context.drawn.features[network.name]), bootstrap)
        measures.append(Measure(kernel_name(network), found, "lower", about=about))
        behind = _on(network, decoded.features[network.name])
        if min(len(behind), len(real) - len(behind)) >= 2:
            floor = kernel_distance_estimate(real[len(behind) :], behind, bootstrap)
            about = "A floor: the same between real pictures and other real ones that the autoencoder gave back."
            measures.append(Measure(f"{kernel_name(network)}_of_autoencoder", floor, "none", about=about))
    if context.data.clip:
        measures.append(_cmmd(context, bootstrap))
    return PartResult("kernel", KERNEL.title, measures, galleries=[_pictures(context)], record=_record(context))


def _cmmd(context: Context, bootstrap: Bootstrap) -> Measure:
    assert context.data.clip is not None
    clip, network = context.data.clip, context.data.clip.network
    sets = (context.data.reference.features[network.name], context.drawn.features[network.name])
    real, drawn = (_on(network, features) for features in sets)
    estimate = kernel_distance_estimate(real, drawn, bootstrap, kernel=gaussian_kernel, scale=CMMD_SCALE)
    about = f"CMMD: kernel distance (Gaussian kernel, σ = 10) on features of the CLIP {clip.name}, times 1000."
    return Measure(f"cmmd_{clip.name}", estimate, "lower", about=about)


def _pictures(context: Context) -> Gallery:
    drawn = context.drawn
    pictures = tuple(as_picture(image) for image in drawn.whole)
    return Gallery("The first pictures drawn", pictures, tuple(drawn.captions[: len(pictures)]))


def _record(context: Context) -> dict[str, object]:
    return {
        "drawn": len(context.drawn),
        "real": len(context.data.reference),
        "networks": [network.name for network in context.data.judges],
    }


def _on(network: FeatureNetwork, features: Tensor) -> Tensor:
    return features.to(network.device)


FRECHET = Part("frechet", "Fréchet distance", check_frechet, _frechet)
KERNEL = Part("kernel", "Kernel distance", check_networks, _kernel)
