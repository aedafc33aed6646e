"""Parts that compare the drawn images with real ones as sets: Fréchet and kernel distance, neighbours, copies.

Shapes: features (N,D); thumbnails (N,3,s,s), uint8.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.clip import Clip
from hdm_lightning.evaluation.context import Context, feature_networks, needs, training_images
from hdm_lightning.evaluation.findings import Found, Gallery, Group, Measure
from hdm_lightning.evaluation.image_sets import ImageSet, pixels
from hdm_lightning.metrics.distances import (
    CMMD_SCALE,
    FEWEST_SAMPLES,
    frechet_estimate,
    frechet_needs,
    gaussian_kernel,
    kernel_distance_estimate,
)
from hdm_lightning.metrics.features import frechet_name, kernel_name
from hdm_lightning.metrics.neighbours import (
    CLOSE_SHARE,
    MOST_SAMPLES,
    NEIGHBOURS,
    Nearest,
    closeness_estimates,
    nearest,
    neighbour_estimates,
    pixel_rmse,
)

PIXEL_SIDE_PX = 16
FEWEST_TRAIN = 10
_SHOWN_PAIRS = 8
_NEIGHBOURS_ABOUT = {
    "precision": "Share of drawn images that lie in the neighbourhood of a real one: quality.",
    "recall": "Share of real images that lie in the neighbourhood of a drawn one: variety.",
    "density": "Real neighbourhoods that a drawn image lies in, over k; about 1 for real ones, and may exceed it.",
    "coverage": "Share of real images whose neighbourhood holds a drawn one: variety.",
}
_RATIO = "Median distance to the nearest training image, over that of held-out real images; below 1: nearer."
_CLOSER = f"Share of drawn images nearer than all but {CLOSE_SHARE:.0%} of the held-out ones."
_RMSE = "Root mean squared difference to the nearest training image by features, in grey levels."


def frechet_counts(context: Context) -> None:
    """The Fréchet distance of every network has the samples it needs."""
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
                hint=f"give {more}--samples {needed}, or rely on {kernel_name(network)}, which works from 2 on",
            )


@needs(feature_networks, frechet_counts)
def frechet(context: Context) -> Found:
    """Fréchet distance on every network."""
    _ = context.real.reference
    frechet_counts(context)  # again: now it is known how many of the reference images can be read
    measures = []
    for network in context.real.networks:
        estimate = frechet_estimate(*context.features(network), context.settings.set_bootstrap)
        about = (
            f"Fréchet distance of {network.width} features of {network.name}, each set as one Gaussian; "
            "biased upwards at small counts."
        )
        measures.append(Measure(frechet_name(network), estimate, "lower", about=about))
    return Found(measures, record=_record(context))


@needs(feature_networks)
def kernel(context: Context) -> Found:
    """Kernel distance on every network, a floor by the autoencoder alone, and CMMD where there is a CLIP."""
    measures, bootstrap = [], context.settings.bootstrap
    decoded = context.real.decoded(context.pipeline)
    for network in context.real.networks:
        real, drawn = context.features(network)
        about = f"Kernel distance (cubic kernel) on {network.width} features of {network.name}; unbiased."
        estimate = kernel_distance_estimate(real, drawn, bootstrap)
        measures.append(Measure(kernel_name(network), estimate, "lower", about=about))
        behind = decoded.features[network.name].to(network.device)
        if min(len(behind), len(real) - len(behind)) >= FEWEST_SAMPLES:
            floor = kernel_distance_estimate(real[len(behind) :], behind, bootstrap)
            about = "A floor: the same between real images and other real ones that the autoencoder gave back."
            measures.append(Measure(f"{kernel_name(network)}_of_autoencoder", floor, "none", about=about))
    if context.real.clip:
        measures.append(_cmmd(context, context.real.clip))
    return Found(measures, galleries=[_side_by_side(context)], record=_record(context))


def _cmmd(context: Context, clip: Clip) -> Measure:
    sets = context.features(clip.network)
    estimate = kernel_distance_estimate(*sets, context.settings.bootstrap, kernel=gaussian_kernel, scale=CMMD_SCALE)
    about = f"CMMD: kernel distance (Gaussian kernel, σ = 10) on features of the CLIP {clip.name}, times 1000."
    return Measure(f"cmmd_{clip.name}", estimate, "lower", about=about)


def _side_by_side(context: Context) -> Gallery:
    """The first images drawn, each beside the real one whose caption it was drawn from."""
    drawn, real = context.drawn, context.real.reference
    shown = zip(drawn.captions, drawn.whole, real.whole, strict=False)
    groups = tuple(Group(caption, {"drawn": pixels(one), "real": pixels(other)}) for caption, one, other in shown)
    return Gallery("The first images drawn, beside the real ones of the same captions", groups)


def _record(context: Context) -> Mapping[str, object]:
    return {
        "drawn": len(context.drawn),
        "real": len(context.real.reference),
        "networks": [network.name for network in context.real.all_networks],
    }


def neighbour_counts(context: Context) -> None:
    """Every image has enough others to be its neighbours."""
    fewest = min(context.settings.samples, context.real.reference_count)
    if fewest <= NEIGHBOURS:
        raise UserError(
            f"{NEIGHBOURS} neighbours need more than {NEIGHBOURS} images of each kind, there are {fewest}",
            where="--samples",
            hint=f"give --samples {10 * NEIGHBOURS} and as many reference images",
        )


@needs(feature_networks, neighbour_counts)
def neighbours(context: Context) -> Found:
    """Precision, recall, density and coverage on the first network."""
    _ = context.real.reference
    neighbour_counts(context)  # again: now it is known how many of the reference images can be read
    found = neighbour_estimates(*context.features(context.network), context.settings.set_bootstrap)
    measures = [Measure(name, estimate, "higher", about=_NEIGHBOURS_ABOUT[name]) for name, estimate in found.items()]
    record = {"network": context.network.name, "neighbours": NEIGHBOURS, "most_samples": MOST_SAMPLES}
    return Found(measures, record=record)


def enough_training_images(context: Context) -> None:
    """The training set is known, and large enough to be searched for copies."""
    hint = f"give the folder that the model was trained on, and at least --train-samples {FEWEST_TRAIN}"
    training_images(context, "the search for copies", FEWEST_TRAIN, hint)


@needs(feature_networks, enough_training_images)
def copies(context: Context) -> Found:
    """The nearest training image of each drawn one by features and by pixels, to see what was memorised."""
    train, drawn, heldout = context.real.train, context.drawn, context.real.reference
    measures, galleries, matches = [], [], {}
    for kind in ("features", "pixels"):
        among, queries, others = (_vectors(context, images, kind) for images in (train, drawn, heldout))
        matches[kind] = nearest(queries, among)
        unseen = nearest(others, among, query_keys=heldout.keys, keys=train.keys)
        found = closeness_estimates(matches[kind].distance, unseen.distance, context.settings.bootstrap)
        if "ratio" in found:
            measures.append(Measure(f"distance_ratio_{kind}", found["ratio"], "none", about=_RATIO))
        measures.append(Measure(f"closer_{kind}", found["closer"], "lower", about=_CLOSER, chance=CLOSE_SHARE))
        galleries.append(_nearest_pairs(drawn, train, matches[kind], kind))
    rmse = context.settings.bootstrap.mean(pixel_rmse(train.thumbnails[matches["features"].row], drawn.thumbnails))
    measures.append(Measure("rmse_of_nearest", rmse, "none", "grey levels", _RMSE))
    record = {"train": len(train), "drawn": len(drawn), "heldout": len(heldout)}
    return Found(measures, galleries=galleries, record=record)


def _vectors(context: Context, images: ImageSet, kind: str) -> Tensor:
    """Features of images; or their thumbnails averaged down to 16 pixels a side, (N,768), values in [0, 1]."""
    if kind == "features":
        return images.features[context.network.name]
    size = (PIXEL_SIDE_PX, PIXEL_SIDE_PX)
    return torch.nn.functional.adaptive_avg_pool2d(images.thumbnails.float() / 255.0, size).flatten(1)


def _nearest_pairs(drawn: ImageSet, train: ImageSet, found: Nearest, kind: str) -> Gallery:
    groups = []
    for row in found.distance.argsort()[:_SHOWN_PAIRS].tolist():
        match = int(found.row[row])
        pair = drawn.thumbnails[row], train.thumbnails[match]
        grey_levels = float(pixel_rmse(pair[0][None], pair[1][None]))
        caption = (
            f"drawn: {drawn.captions[row]}; training: {train.captions[match]} "
            f"(distance {float(found.distance[row]):.3g}, {grey_levels:.0f} grey levels)"
        )
        groups.append(Group(caption, {"drawn": pixels(pair[0]), "training": pixels(pair[1])}))
    return Gallery(f"Nearest pairs by {kind}", tuple(groups))
