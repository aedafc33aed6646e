"""Parts that compare generated images with their captions: agreement by CLIP or a small head, and prompts of shapes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.datasets.shapes import Prompt, rule_of, scene_prompts
from hdm_lightning.datasets.shapes_scenes import HeldOut, Split
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.clip import Clip, clip_scores
from hdm_lightning.evaluation.context import Context, agreement_head, holds, needs
from hdm_lightning.evaluation.findings import Found, Gallery, Group, Measure, Outcomes
from hdm_lightning.evaluation.image_sets import ImageSet, pixels
from hdm_lightning.generation.scoring import draw_and_score, score_decoded
from hdm_lightning.metrics.agreement_head import rank_shares
from hdm_lightning.metrics.bootstrap import Estimate
from hdm_lightning.metrics.prompt_following import Graded, gap, in_words
from hdm_lightning.metrics.shapes_reader import MIN_SIDE_PX

MOST_RANKED = 2000
CHANCE_RANK = 0.5
CONTROL_SHARE = 0.8
"""Share of the head's score above chance on real images that it has to reach on decoded ones."""

SPLITS: dict[str, Split] = {"unseen": "heldout", "seen": "train"}
UNITS: dict[HeldOut, tuple[str, ...]] = {"pairs": ("colour", "shape"), "triples": ("colour", "shape", "size")}
_WHAT: dict[HeldOut, str] = {
    "pairs": "pairs of color and shape",
    "triples": "color, shape and size (training shows the pair in the other size)",
}
_FIRST = ("relation_bound", "colour_and_shape", "everything")
_SHOWN = 12
_RANK = (
    "Share of other captions that an image's own outscores, by a small head trained on real pairs that went through "
    "the autoencoder; it sees only what the frozen features show."
)
_RANKED = {
    "real": "The same for real pairs that the head was not trained on.",
    "decoded": "Control: the same for those pairs after the autoencoder: the best that generated images can reach.",
}
_WITHHELD = f"on real images after the autoencoder the head has less than {CONTROL_SHARE:.0%} of its score on real ones"


def clip_or_head(context: Context) -> None:
    """Require a CLIP, or an agreement head that can be trained."""
    if context.real.clip is None:
        agreement_head(context)


@needs(clip_or_head)
def agreement(context: Context) -> Found:
    """Measure whether images show what their captions say, with a CLIP if there is one and with a small head."""
    measures: list[Measure] = []
    outcomes: dict[str, Outcomes] = {}
    record: dict[str, Any] = {"drawn": len(context.drawn), "real": len(context.real.reference), "ranked": MOST_RANKED}
    if context.real.clip is not None:
        measures += _by_clip(context, context.real.clip)
    if holds(agreement_head, context):
        for kind, about in _RANKED.items():
            name, rank = f"caption_rank_of_{kind}", _rank_of(context, kind)
            measures.append(Measure(name, rank, "none", about=about, chance=CHANCE_RANK))
        if head_is_valid(context):
            drawn = _ranks(context, context.drawn.features[context.network.name], context.drawn.captions)
            mean = context.settings.bootstrap.mean(drawn)
            measures.append(Measure("caption_rank", mean, "higher", about=_RANK, chance=CHANCE_RANK))
            outcomes["caption_rank"] = Outcomes(drawn.tolist())
        else:
            record["caption_rank_withheld"] = _WITHHELD
    return Found(measures, record=record, outcomes=outcomes)


def head_is_valid(context: Context) -> bool:
    """Return whether the head tells captions of decoded images apart about as well as those of real ones.

    Generated images come out of the autoencoder. If the head fails on real images that did so as well, its score on
    generated ones is about the autoencoder, not about captions.
    """
    real, decoded = (_rank_of(context, kind) for kind in _RANKED)
    return decoded.value - CHANCE_RANK >= CONTROL_SHARE * (real.value - CHANCE_RANK) and decoded.low > CHANCE_RANK


def _rank_of(context: Context, kind: str) -> Estimate:
    """Estimate the head's rank of pairs that it was not trained on, with real or with decoded images."""
    return context.real.once(f"caption_rank_{kind}", _measured_rank, context, kind)


def _measured_rank(context: Context, kind: str) -> Estimate:
    context.real.head(context.text_features)  # heldout_rows needs the trained head
    images = context.real.reference if kind == "real" else context.real.decoded
    rows = [row for row in context.real.heldout_rows() if row < len(images)]
    ranks = _ranks(context, images.features[context.network.name][rows], [images.captions[row] for row in rows])
    return context.settings.bootstrap.mean(ranks)


def head_ranks(context: Context, features: Tensor, captions: Sequence[str]) -> Tensor:
    """Return for each image the share of other captions that its own outscores under the head, (N,)."""
    head = context.real.head(context.text_features)
    with torch.no_grad():
        return rank_shares(head(features, context.text_features(captions)), captions)


def _by_clip(context: Context, clip: Clip) -> list[Measure]:
    def scores(images: ImageSet) -> Estimate:
        texts = clip.text_features(images.captions).cpu()
        return context.settings.bootstrap.mean(clip_scores(images.features[clip.network.name], texts))

    about = f"CLIPScore by {clip.name}: 100 · cosine of image and caption."
    of_real = "The same for real images with their own captions."
    return [
        Measure(f"clip_score_{clip.name}", scores(context.drawn), "higher", about=about),
        Measure(f"clip_score_{clip.name}_of_real", scores(context.real.reference), "none", about=of_real),
    ]


def _ranks(context: Context, features: Tensor, captions: Sequence[str]) -> Tensor:
    ranked = captions[:MOST_RANKED]
    if len(set(ranked)) < 2:
        raise UserError("all captions compared are equal", where="--data", hint="pass a folder of varied captions")
    return head_ranks(context, features[:MOST_RANKED], ranked)


def scenes_of_shapes(context: Context) -> None:
    """Require reference images that are scenes of shapes with known answers, and a size that can be read."""
    objects = context.real.first_record.get("objects")
    first = objects[0] if isinstance(objects, list) and objects else None
    known = isinstance(first, dict) and {"colour", "shape", "size"} <= set(first)
    if not known or "background" not in context.real.first_record:
        raise UserError(
            "the reference images are not scenes of shapes with known answers",
            where="--data",
            hint="pass a folder made by `hdm-shards build shapes`; for other data see the part agreement",
        )
    if min(context.sampling.height, context.sampling.width) < MIN_SIDE_PX:
        side = f"{context.sampling.width}x{context.sampling.height}"
        raise UserError(f"images of {side} are too small to read", where="--size", hint=f"use at least {MIN_SIDE_PX}")


@needs(scenes_of_shapes)
def shapes(context: Context) -> Found:
    """Measure how well prompts are followed, with pairs of color and shape that training never shows or shows."""
    rule = rule_of(context.real.first_record)
    measures: list[Measure] = []
    galleries: list[Gallery] = []
    outcomes = {}
    for objects, prefix in ((1, "one"), (2, "two")):
        graded = {kind: _drawn(context, objects, kind, rule, galleries) for kind in SPLITS}
        decoded = context.real.once(f"decoded_{prefix}", _answers, context, objects, rule)
        measures += _criteria(context, prefix, graded, decoded, rule)
        for kind, each in graded.items():
            for name in each.chance:
                right, trials = each.outcomes(name)
                outcomes[f"{prefix}_{kind}_{name}"] = Outcomes(right.tolist(), trials.tolist(), each.units)
    return Found(measures, galleries=galleries, record={"held_out": rule}, outcomes=outcomes)


def _prompts(context: Context, objects: int, kind: str, rule: HeldOut) -> list[Prompt]:
    count = context.settings.shapes_prompts if objects == 1 else context.settings.shapes_pairs
    return scene_prompts(count, split=SPLITS[kind], objects=objects, rule=rule)


def _drawn(context: Context, objects: int, kind: str, rule: HeldOut, galleries: list[Gallery]) -> Graded:
    what = f"{kind} prompts of {'one object' if objects == 1 else 'two objects'}"
    prompts = _prompts(context, objects, kind, rule)
    captions = [prompt.caption for prompt in prompts]
    scored = draw_and_score(
        context.pipeline,
        captions,
        [prompt.spec for prompt in prompts],
        context.sampling,
        seed=context.settings.seed,
        unit=UNITS[rule],
        progress=partial(context.progress, what),
    )
    shown = zip(captions[:_SHOWN], scored.images[:_SHOWN], strict=True)
    groups = tuple(Group(caption, {"drawn": pixels(image)}) for caption, image in shown)
    galleries.append(Gallery(what.capitalize(), groups))
    return scored.graded


def _answers(context: Context, objects: int, rule: HeldOut) -> Graded:
    """Grade right answers to the unseen prompts after the autoencoder."""
    prompts = _prompts(context, objects, "unseen", rule)
    side = min(context.sampling.height, context.sampling.width)
    images, specs = [prompt.image(side) for prompt in prompts], [prompt.spec for prompt in prompts]
    return score_decoded(context.real.encoders, images, specs, unit=UNITS[rule])


def _criteria(
    context: Context, prefix: str, graded: Mapping[str, Graded], decoded: Graded, rule: HeldOut
) -> list[Measure]:
    """Return the measures, most important first: unseen, seen, the gap between them, and the score of right answers."""
    intervals, measures = context.settings.bootstrap, []
    found = {kind: each.estimates(intervals) for kind, each in graded.items()}
    most, chance = decoded.estimates(intervals), graded["unseen"].chance
    for name in sorted(chance, key=lambda each: _FIRST.index(each) if each in _FIRST else len(_FIRST)):
        words, hint = in_words(name), _WHAT[rule]
        seen, unseen = found["seen"][name], found["unseen"][name]
        about = f"{words.capitalize()} right, of {prefix}, in prompts with {hint} that training never shows."
        measures.append(Measure(f"{prefix}_unseen_{name}", unseen, "higher", about=about, chance=chance[name]))
        about = "The same with those that training shows."
        of_seen = graded["seen"].chance[name]
        measures.append(Measure(f"{prefix}_seen_{name}", seen, "higher", about=about, chance=of_seen))
        about = "Seen minus unseen: the cost of composing."
        measures.append(Measure(f"{prefix}_gap_{name}", gap(seen, unseen), "zero", about=about))
        about = "Score of right answers after the autoencoder: the best that can be reached."
        measures.append(Measure(f"{prefix}_decoded_{name}", most[name], "none", about=about))
    return measures
