"""Part `agreement`: do pictures show what their captions say? By a CLIP if one is given, and by a small own head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdm_lightning.assessment.clip import ClipJudge, clip_scores
from hdm_lightning.assessment.context import Context
from hdm_lightning.assessment.part import Part
from hdm_lightning.assessment.pictures import PictureSet
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.results import Measure, PartResult
from hdm_lightning.metrics.agreement_head import FEWEST_PAIRS, rank_shares

MOST_RANKED = 2000


def check_head(context: Context) -> None:
    """The head can be trained.

    Raises:
        UserError: the training set is unknown or too small.
    """
    context.data.require_networks()
    context.data.require_train("the agreement head")
    assert context.data.train_plan is not None
    have = min(context.settings.train_samples, context.data.train_plan.samples)
    if have < 2 * FEWEST_PAIRS:
        raise UserError(
            f"the agreement head learns from at least {2 * FEWEST_PAIRS} training pictures, there are {have}",
            where="--train-samples",
            hint=f"give --train-samples {2 * FEWEST_PAIRS} and a training set with as many, or --clip NAME",
        )


def head_ranks(context: Context, features: Tensor, captions: Sequence[str]) -> Tensor:
    """For each picture the share of other captions that its own outscores under the head, (N,)."""
    head = context.data.head(context.text_features)
    with torch.no_grad():
        return rank_shares(head(features, context.text_features(captions)), captions)


def _check(context: Context) -> None:
    if context.data.clip is None:
        check_head(context)


def _run(context: Context) -> PartResult:
    measures = []
    if context.data.clip is not None:
        measures += _by_clip(context, context.data.clip)
    try:
        check_head(context)
        measures += _by_head(context)
    except UserError:
        if context.data.clip is None:
            raise
    record = {"drawn": len(context.drawn), "real": len(context.data.reference), "ranked": MOST_RANKED}
    return PartResult("agreement", AGREEMENT.title, measures, record=record)


def _by_clip(context: Context, clip: ClipJudge) -> list[Measure]:
    def scores(pictures: PictureSet) -> Tensor:
        texts = clip.text_features(pictures.captions).cpu()
        return clip_scores(pictures.features[clip.network.name], texts)

    drawn, real = (context.settings.bootstrap.mean(scores(s)) for s in (context.drawn, context.data.reference))
    about = f"CLIPScore by {clip.name}: 100 · cosine of picture and caption."
    behind = "The same of real pictures with their own captions."
    return [
        Measure(f"clip_score_{clip.name}", drawn, "higher", about=about),
        Measure(f"clip_score_{clip.name}_of_real", real, "none", about=behind),
    ]


def _by_head(context: Context) -> list[Measure]:
    network, bootstrap, real = context.data.networks[0].name, context.settings.bootstrap, context.data.reference
    about = (
        "Share of other captions that a picture's own outscores, by a small head trained on real pairs; "
        "sees only what the frozen features tell."
    )
    behind = "The same of real pairs that the head was not trained on: what it can tell at best."
    drawn = _ranks(context, context.drawn.features[network], context.drawn.captions)
    rows = context.data.heldout_rows()
    heldout = _ranks(context, real.features[network][rows], [real.captions[row] for row in rows])
    return [
        Measure("caption_rank", bootstrap.mean(drawn), "higher", about=about, chance=0.5),
        Measure("caption_rank_of_real", bootstrap.mean(heldout), "none", about=behind, chance=0.5),
    ]


def _ranks(context: Context, features: Tensor, captions: Sequence[str]) -> Tensor:
    ranked = captions[:MOST_RANKED]
    if len(set(ranked)) < 2:
        raise UserError("there are no different captions to tell apart", where="--data", hint="give a varied folder")
    return head_ranks(context, features[:MOST_RANKED], ranked)


AGREEMENT = Part("agreement", "Agreement of pictures with their captions", _check, _run)
