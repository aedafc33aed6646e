"""Parts that compare drawn images with their captions: agreement by a CLIP or a small head, and prompts of shapes."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hdm_lightning.datasets.shapes import heldout_prompts
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.clip import Clip, clip_scores
from hdm_lightning.evaluation.context import Context, agreement_head, holds, needs
from hdm_lightning.evaluation.findings import Found, Gallery, Group, Measure
from hdm_lightning.evaluation.image_sets import ImageSet, pixels
from hdm_lightning.generation.scoring import ScoredImages, draw_and_score
from hdm_lightning.metrics.agreement_head import rank_shares
from hdm_lightning.metrics.bootstrap import PERCENTILE, Estimate
from hdm_lightning.metrics.shapes_reader import MIN_SIDE_PX

MOST_RANKED = 2000
_SHOWN = 12


def clip_or_head(context: Context) -> None:
    """There is a CLIP, or the agreement head can be trained."""
    if context.real.clip is None:
        agreement_head(context)


@needs(clip_or_head)
def agreement(context: Context) -> Found:
    """Do images show what their captions say? By a CLIP if one is given, and by a small head of the project's own."""
    measures = [] if context.real.clip is None else _by_clip(context, context.real.clip)
    if holds(agreement_head, context):
        measures += _by_head(context)
    record = {"drawn": len(context.drawn), "real": len(context.real.reference), "ranked": MOST_RANKED}
    return Found(measures, record=record)


def head_ranks(context: Context, features: Tensor, captions: Sequence[str]) -> Tensor:
    """For each image the share of other captions that its own outscores under the head, (N,)."""
    head = context.real.head(context.text_features)
    with torch.no_grad():
        return rank_shares(head(features, context.text_features(captions)), captions)


def _by_clip(context: Context, clip: Clip) -> list[Measure]:
    def scores(images: ImageSet) -> Estimate:
        texts = clip.text_features(images.captions).cpu()
        return context.settings.bootstrap.mean(clip_scores(images.features[clip.network.name], texts))

    about = f"CLIPScore by {clip.name}: 100 · cosine of image and caption."
    of_real = "The same of real images with their own captions."
    return [
        Measure(f"clip_score_{clip.name}", scores(context.drawn), "higher", about=about),
        Measure(f"clip_score_{clip.name}_of_real", scores(context.real.reference), "none", about=of_real),
    ]


def _by_head(context: Context) -> list[Measure]:
    network, bootstrap, real = context.network.name, context.settings.bootstrap, context.real.reference
    about = (
        "Share of other captions that an image's own outscores, by a small head trained on real pairs; "
        "sees only what the frozen features show."
    )
    of_real = "The same of real pairs that the head was not trained on: what it can distinguish at best."
    drawn = _ranks(context, context.drawn.features[network], context.drawn.captions)
    rows = context.real.heldout_rows()
    heldout = _ranks(context, real.features[network][rows], [real.captions[row] for row in rows])
    return [
        Measure("caption_rank", bootstrap.mean(drawn), "higher", about=about, chance=0.5),
        Measure("caption_rank_of_real", bootstrap.mean(heldout), "none", about=of_real, chance=0.5),
    ]


def _ranks(context: Context, features: Tensor, captions: Sequence[str]) -> Tensor:
    ranked = captions[:MOST_RANKED]
    if len(set(ranked)) < 2:
        raise UserError("there are no different captions to compare", where="--data", hint="give a varied folder")
    return head_ranks(context, features[:MOST_RANKED], ranked)


def scenes_of_shapes(context: Context) -> None:
    """The reference images are scenes of shapes with known answers, and drawn ones large enough to be read."""
    objects = context.real.first_record.get("objects")
    first = objects[0] if isinstance(objects, list) and objects else None
    known = isinstance(first, dict) and {"colour", "shape", "size"} <= set(first)
    if not known or "background" not in context.real.first_record:
        raise UserError(
            "the reference images are no scenes of shapes with known answers",
            where="--data",
            hint="give a folder made by `hdm-shards build shapes`; for other data see the part agreement",
        )
    if min(context.sampling.height, context.sampling.width) < MIN_SIDE_PX:
        side = f"{context.sampling.width}x{context.sampling.height}"
        raise UserError(f"images of {side} are too small to be read", where="--size", hint=f"at least {MIN_SIDE_PX}")


@needs(scenes_of_shapes)
def shapes(context: Context) -> Found:
    """Following prompts whose combinations of colour, shape and size training never shows."""
    measures, galleries = [], []
    counts = {1: context.settings.shapes_prompts, 2: context.settings.shapes_pairs}
    for objects, prefix, what in ((1, "one", "one object"), (2, "two", "two objects")):
        prompts = heldout_prompts(counts[objects], objects=objects)
        captions = [prompt.caption for prompt in prompts]
        scored = draw_and_score(
            context.pipeline,
            captions,
            [prompt.spec for prompt in prompts],
            context.sampling,
            seed=context.settings.seed,
            intervals=context.settings.bootstrap,
            progress=partial(context.progress, what),
        )
        measures += _criteria(scored, prefix, what, context.settings.resamples)
        shown = zip(captions[:_SHOWN], scored.images[:_SHOWN], strict=True)
        groups = tuple(Group(caption, {"drawn": pixels(image)}) for caption, image in shown)
        galleries.append(Gallery(f"Held-out prompts of {what}", groups))
    return Found(measures, galleries=galleries, record={"split": "heldout"})


def _criteria(scored: ScoredImages, prefix: str, what: str, resamples: int) -> list[Measure]:
    measures = []
    for name, score in scored.scores.items():
        # Images are what is independent: one of two objects has two trials of a colour.
        samples = min(score.trials, len(scored.images))
        estimate = Estimate(score.share, score.low, score.high, samples, PERCENTILE, resamples)
        criterion = name.replace("_", " ")
        about = f"Share right in prompts of {what} whose combinations training never shows: {criterion}."
        measures.append(Measure(f"{prefix}_{name}", estimate, "higher", about=about, chance=score.chance))
    return measures
