"""Part `copies`: the nearest training picture of each drawn one, to see what was memorised."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hdm_lightning.assessment.context import Context
from hdm_lightning.assessment.part import Part
from hdm_lightning.assessment.pictures import PictureSet, as_picture
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.results import Gallery, Measure, PartResult
from hdm_lightning.metrics.neighbours import CLOSE_SHARE, Nearest, closeness_estimates, nearest, pixel_rmse

PIXEL_SIDE_PX = 16
_SHOWN_PAIRS = 8
FEWEST_TRAIN = 10


def _check(context: Context) -> None:
    context.data.require_networks()
    context.data.require_train("the search for copies")
    assert context.data.train_plan is not None
    have = min(context.settings.train_samples, context.data.train_plan.samples)
    if have < FEWEST_TRAIN:
        raise UserError(
            f"the search for copies needs at least {FEWEST_TRAIN} training pictures, there are {have}",
            where="--train-data",
            hint=f"give the folder that the model was trained on, and at least --train-samples {FEWEST_TRAIN}",
        )


@dataclass(frozen=True)
class _Search:
    """Nearest training pictures of drawn and of held-out real ones under one distance."""

    drawn: Nearest
    heldout: Nearest


def _run(context: Context) -> PartResult:
    by_features, by_pixels = _searches(context)
    measures = []
    for name, search in (("features", by_features), ("pixels", by_pixels)):
        found = closeness_estimates(search.drawn.distance, search.heldout.distance, context.settings.bootstrap)
        ratio = "Median distance to the nearest training picture, over that of held-out real pictures; below 1: nearer."
        closer = f"Share of drawn pictures nearer than all but {CLOSE_SHARE:.0%} of the held-out ones."
        if "ratio" in found:
            measures.append(Measure(f"distance_ratio_{name}", found["ratio"], "none", about=ratio))
        measures.append(Measure(f"closer_{name}", found["closer"], "lower", about=closer, chance=CLOSE_SHARE))
    train, drawn = context.data.train, context.drawn
    rmse = pixel_rmse(train.thumbnails[by_features.drawn.row], drawn.thumbnails)
    about = "Root mean squared difference to the nearest training picture by features, in grey levels."
    measures.append(Measure("rmse_of_nearest", context.settings.bootstrap.mean(rmse), "none", "grey levels", about))
    record = {"train": len(train), "drawn": len(drawn), "heldout": len(context.data.reference)}
    galleries = [_gallery(context, by_features.drawn, "features"), _gallery(context, by_pixels.drawn, "pixels")]
    return PartResult("copies", COPIES.title, measures, galleries=galleries, record=record)


def _searches(context: Context) -> tuple[_Search, _Search]:
    train, reference, drawn = context.data.train, context.data.reference, context.drawn
    network = context.data.networks[0].name

    def search(kind: str) -> _Search:
        def vectors(pictures: PictureSet) -> Tensor:
            return pictures.features[network] if kind == "features" else _small(pictures.thumbnails)

        among = vectors(train)
        own = {"query_keys": reference.keys, "keys": train.keys}
        return _Search(nearest(vectors(drawn), among), nearest(vectors(reference), among, **own))

    return search("features"), search("pixels")


def _small(thumbnails: Tensor) -> Tensor:
    """Thumbnails averaged down to 16 pixels a side, as vectors (N,768) of values in [0, 1]."""
    size = (PIXEL_SIDE_PX, PIXEL_SIDE_PX)
    return torch.nn.functional.adaptive_avg_pool2d(thumbnails.float() / 255.0, size).flatten(1)


def _gallery(context: Context, found: Nearest, kind: str) -> Gallery:
    """The pairs that are nearest, the drawn picture beside the training one."""
    train, drawn = context.data.train, context.drawn
    order = found.distance.argsort()[:_SHOWN_PAIRS]
    pictures, captions = [], []
    for row in order.tolist():
        match = int(found.row[row])
        pictures += [as_picture(drawn.thumbnails[row]), as_picture(train.thumbnails[match])]
        difference = pixel_rmse(drawn.thumbnails[row : row + 1], train.thumbnails[match : match + 1])
        captions += [
            f"drawn: {drawn.captions[row]}",
            f"training: {train.captions[match]} (distance {float(found.distance[row]):.3g}, {float(difference):.0f} "
            "grey levels)",
        ]
    title = f"Nearest pairs by {kind}"
    return Gallery(title, tuple(pictures), tuple(captions), 4)


COPIES = Part("copies", "Nearest training pictures", _check, _run)
