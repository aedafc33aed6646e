"""The part that looks for copies of training images, and measures its own sensitivity with planted copies.

Shapes: N training images, M generated ones, K held out; thumbnails (N,3,s,s), uint8. All of them have gone through the
autoencoder, whose artifacts would otherwise set generated images apart from any training image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hdm_lightning.evaluation.context import Context, feature_networks, needs, training_images
from hdm_lightning.evaluation.findings import Better, Found, Gallery, Group, Measure, Outcomes
from hdm_lightning.evaluation.image_sets import ImageSet, pixels
from hdm_lightning.metrics.bootstrap import Estimate
from hdm_lightning.metrics.neighbours import (
    CLOSE_SHARE,
    Nearest,
    closeness_estimates,
    found_planted,
    nearest,
    pixel_rmse,
)

PIXEL_SIDE_PX = 16
FEWEST_TRAIN = 10
KINDS = ("features", "pixels")
MOST_PLANTED = 200
PLANTED_NOISE = 0.1
NEEDED_POWER = 0.8
"""Share of planted copies that a search has to find for its result to be meaningful."""


class Sort(NamedTuple):
    """A sort of planted copies: how far they are moved, as a share of the side, and their description in the report."""

    shift: float
    about: str


PLANTED = {
    "planted": Sort(0.0, "Control: share of training images found after a little noise in their latent."),
    "moved": Sort(1 / 16, "Control: the same for training images moved by a sixteenth of their side."),
}
_SHOWN_PAIRS = 8
_RATIO = "Median distance to the nearest training image, over that of held-out real images; below 1: closer."
_CLOSER = f"Share of generated images closer than all but {CLOSE_SHARE:.0%} of held-out ones, all autoencoded."
_RMSE = "Root mean squared difference to the nearest training image by features, in gray levels."


def enough_training_images(context: Context) -> None:
    """Require a known training set that is large enough to be searched for copies."""
    hint = f"pass the folder that the model was trained on, and at least --train-samples {FEWEST_TRAIN}"
    training_images(context, "the search for copies", FEWEST_TRAIN, hint)


@needs(feature_networks, enough_training_images)
def copies(context: Context) -> Found:
    """Find the nearest training image of each generated one, by features and by pixels, to see what was memorized."""
    train, drawn, heldout, plan = context.real.train, context.drawn, context.real.decoded, context.real.train_plan
    assert plan is not None
    searched = len(train) / plan.samples
    bootstrap = context.settings.bootstrap
    measures, galleries, outcomes = [], [], {}
    for kind in KINDS:
        among = _vectors(context, train, kind)
        unseen = context.real.once(f"unseen_{kind}", _unseen, context, kind)
        power = context.real.once(f"planted_{kind}", _planted, context, kind, unseen)
        match = nearest(_vectors(context, drawn, kind), among)
        found = closeness_estimates(match.distance, unseen, bootstrap)
        measures += [Measure(f"found_{name}_{kind}", one, "none", about=PLANTED[name].about) for name, one in power]
        if "ratio" in found:
            measures.append(Measure(f"distance_ratio_{kind}", found["ratio"], "none", about=_RATIO))
        measures.append(_closer(kind, found["closer"], power[0][1], searched))
        outcomes[f"closer_{kind}"] = Outcomes((match.distance < torch.quantile(unseen, CLOSE_SHARE)).double().tolist())
        galleries.append(_nearest_pairs(drawn, train, match, kind))
        if kind == "features":
            rmse = bootstrap.mean(pixel_rmse(train.thumbnails[match.row], drawn.thumbnails))
            measures.append(Measure("rmse_of_nearest", rmse, "none", "gray levels", _RMSE))
    counts = {"train": len(train), "drawn": len(drawn), "heldout": len(heldout)}
    record = {**counts, "searched_share": searched, "needed_power": NEEDED_POWER}
    return Found(measures, galleries=galleries, record=record, outcomes=outcomes)


def _closer(kind: str, closer: Estimate, power: Estimate, searched: float) -> Measure:
    """Return the share that is closer than held-out images; no verdict if planted copies are not found."""
    about = f"{_CLOSER} {searched:.0%} of the training set was searched."
    if power.value < NEEDED_POWER:
        about += f" Not meaningful here: it finds only {power.value:.0%} of planted copies."
    better: Better = "lower" if power.value >= NEEDED_POWER else "none"
    return Measure(f"closer_{kind}", closer, better, about=about, chance=CLOSE_SHARE)


def _unseen(context: Context, kind: str) -> Tensor:
    """Return the distances of held-out images to their nearest training image, (K,)."""
    train, heldout = context.real.train, context.real.decoded
    vectors = (_vectors(context, images, kind) for images in (heldout, train))
    return nearest(*vectors, query_keys=heldout.keys, keys=train.keys).distance


def _planted(context: Context, kind: str, unseen: Tensor) -> list[tuple[str, Estimate]]:
    """Return the share of planted copies of each sort that the search finds."""
    train, found = context.real.train, []
    for name, sort in PLANTED.items():
        shift = round(sort.shift * min(context.sampling.height, context.sampling.width))
        count = min(len(train), MOST_PLANTED)
        images = context.real.once(f"planted_{name}", context.real.planted, count, PLANTED_NOISE, shift)
        match = nearest(_vectors(context, images, kind), _vectors(context, train, kind))
        hits = found_planted(match, list(range(len(images))), unseen)
        found.append((name, context.settings.bootstrap.share(hits.double())))
    return found


def _vectors(context: Context, images: ImageSet, kind: str) -> Tensor:
    """Return features of images; or their thumbnails averaged down to 16 pixels a side, (N,768), values in [0, 1]."""
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
            f"generated: {drawn.captions[row]}; training: {train.captions[match]} "
            f"(distance {float(found.distance[row]):.3g}, {grey_levels:.0f} gray levels)"
        )
        groups.append(Group(caption, {"drawn": pixels(pair[0]), "training": pixels(pair[1])}))
    return Gallery(f"Nearest pairs by {kind}", tuple(groups))
