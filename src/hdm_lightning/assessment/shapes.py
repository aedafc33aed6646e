"""Part `shapes`: compositional prompt-following, where the data are scenes with known answers."""

from hdm_lightning.assessment.context import Context
from hdm_lightning.assessment.part import Part
from hdm_lightning.assessment.pictures import as_picture
from hdm_lightning.data.builders.shapes import Prompt, heldout_prompts
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.bootstrap import PERCENTILE, Estimate
from hdm_lightning.evaluation.prompt_following import Score
from hdm_lightning.evaluation.results import Gallery, Measure, PartResult
from hdm_lightning.evaluation.shapes_reader import MIN_SIDE_PX
from hdm_lightning.generation.scoring import ScoredImages, draw_and_score

_SHOWN = 12


def _check(context: Context) -> None:
    objects = context.data.first_record.get("objects")
    first = objects[0] if isinstance(objects, list) and objects else None
    known = isinstance(first, dict) and {"colour", "shape", "size"} <= set(first)
    if not known or "background" not in context.data.first_record:
        raise UserError(
            "the reference pictures are no scenes of shapes with known answers",
            where="--data",
            hint="give a folder made by `hdm-shards build shapes`; for other data see the part agreement",
        )
    if min(context.sampling.height, context.sampling.width) < MIN_SIDE_PX:
        side = f"{context.sampling.width}x{context.sampling.height}"
        raise UserError(f"pictures of {side} are too small to be read", where="--size", hint=f"at least {MIN_SIDE_PX}")


def _run(context: Context) -> PartResult:
    settings = context.settings
    single = _scored(context, heldout_prompts(settings.shapes_prompts), "one shape")
    pairs = _scored(context, heldout_prompts(settings.shapes_pairs, objects=2), "two shapes")
    resamples = settings.resamples
    measures = _measures(single[1], "one", "one object", resamples)
    measures += _measures(pairs[1], "two", "two objects", resamples)
    galleries = [
        Gallery(f"Held-out prompts of {what}", tuple(as_picture(image) for image in scored.images[:_SHOWN]), captions)
        for what, (captions, scored) in (("one object", single), ("two objects", pairs))
    ]
    return PartResult("shapes", SHAPES.title, measures, galleries=galleries, record={"split": "heldout"})


def _scored(context: Context, prompts: list[Prompt], what: str) -> tuple[tuple[str, ...], ScoredImages]:
    captions = [prompt.caption for prompt in prompts]

    def tell(done: int, total: int) -> None:
        context.data.progress(f"{what} ({context.weights})", done, total)

    specs = [prompt.spec for prompt in prompts]
    settings = context.settings
    scored = draw_and_score(
        context.pipeline,
        captions,
        specs,
        context.sampling,
        seed=settings.seed,
        intervals=settings.bootstrap,
        progress=tell,
    )
    return tuple(captions[:_SHOWN]), scored


def _measures(scored: ScoredImages, prefix: str, what: str, resamples: int) -> list[Measure]:
    return [
        Measure(
            f"{prefix}_{name}",
            _estimate(score, len(scored.images), resamples),
            "higher",
            about=f"Share right in prompts of {what} whose combinations training never shows: {name}.".replace(
                "_", " "
            ),
            chance=score.chance,
        )
        for name, score in scored.scores.items()
    ]


def _estimate(score: Score, pictures: int, resamples: int) -> Estimate:
    """Pictures are what is independent: one of two objects has two trials of a colour."""
    return Estimate(score.share, score.low, score.high, min(score.trials, pictures), PERCENTILE, resamples)


SHAPES = Part("shapes", "Following prompts of shapes", _check, _run)
