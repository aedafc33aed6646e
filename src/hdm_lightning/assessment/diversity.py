"""Part `diversity`: how different pictures of one prompt are."""

from hdm_lightning.assessment.context import Context
from hdm_lightning.assessment.part import Part
from hdm_lightning.assessment.pictures import as_picture
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.diversity import diversity_estimates
from hdm_lightning.evaluation.results import Gallery, Measure, PartResult
from hdm_lightning.generation.image_writer import DrawJob

_SHOWN_PROMPTS = 4


def _check(context: Context) -> None:
    context.data.require_networks()
    if context.data.reference_count < 2:
        raise UserError("diversity needs two reference pictures", where="--data", hint="give a larger folder")


def _run(context: Context) -> PartResult:
    settings, network = context.settings, context.data.networks[0]
    prompts = context.prompts(settings.diversity_prompts)
    if len(prompts) < 2:
        raise UserError("diversity needs two different captions", where="--data", hint="give a folder with captions")
    seeds = [settings.seed + number for number in range(settings.diversity_seeds)]
    images = context.images([DrawJob(p, seed, context.sampling) for p in prompts for seed in seeds], "diversity")
    features = network.of_many(images.split(32)).cpu().reshape(len(prompts), len(seeds), -1)
    real = context.data.reference.features[network.name]
    if (real == real[0]).all():
        raise UserError("all reference pictures are equal", where="--data", hint="give a folder of different pictures")
    found = diversity_estimates(features, real, settings.bootstrap)
    measures = [
        Measure(
            "within_prompt",
            found.within,
            "none",
            about="Mean feature distance of pictures of one prompt, as a share of that of real pictures; 0: all alike.",
        ),
        Measure("across_prompts", found.across, "one", about="The same of pictures of different prompts."),
        Measure("real_distance", found.real, "none", about="Mean feature distance of real pictures: the unit above."),
    ]
    shown = range(min(_SHOWN_PROMPTS, len(prompts)) * len(seeds))
    captions = tuple(prompts[row // len(seeds)] if row % len(seeds) == 0 else "" for row in shown)
    gallery = Gallery("One prompt a row", tuple(as_picture(images[row]) for row in shown), captions, len(seeds))
    record = {"prompts": len(prompts), "seeds": len(seeds), "network": network.name}
    return PartResult("diversity", DIVERSITY.title, measures, galleries=[gallery], record=record)


DIVERSITY = Part("diversity", "Diversity", _check, _run)
