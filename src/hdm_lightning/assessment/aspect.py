"""Part `aspect`: pictures of other aspect ratios, compared with squares of the same prompts and seeds."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from hdm_lightning.assessment.agreement import check_head, head_ranks
from hdm_lightning.assessment.context import Context
from hdm_lightning.assessment.part import Part, check_networks
from hdm_lightning.assessment.pictures import as_picture
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.kernel_distance import kernel_distance_estimate
from hdm_lightning.evaluation.results import Gallery, Measure, PartResult
from hdm_lightning.evaluation.stretch import stretch_estimate
from hdm_lightning.generation.image_writer import DrawJob
from hdm_lightning.generation.settings import SamplingSettings

_SHOWN_PROMPTS = 4


@dataclass(frozen=True)
class _Drawn:
    """Pictures of one size, and the features of their middle squares."""

    settings: SamplingSettings
    images: Tensor
    features: Tensor

    @property
    def name(self) -> str:
        return f"{self.settings.width}x{self.settings.height}"


def sized(settings: SamplingSettings, ratio: float, multiple: int) -> SamplingSettings:
    """Settings of a picture of about the same area with another width / height, both multiples of `multiple`."""
    side = math.sqrt(settings.height * settings.width)
    width, height = (max(1, round(length / multiple)) * multiple for length in (side * ratio**0.5, side / ratio**0.5))
    return replace(settings, width=width, height=height)


def _run(context: Context) -> PartResult:
    settings = context.settings
    prompts = context.prompts(settings.aspect_prompts)
    if len(prompts) < 2:
        raise UserError("aspect ratios need two different captions", where="--data", hint="give a folder with captions")
    multiple = context.pipeline.size_multiple
    sizes = dict.fromkeys(sized(context.sampling, ratio, multiple) for ratio in (1.0, *settings.ratios))
    square, *others = (_drawn(context, prompts, size) for size in sizes)
    measures = _common(context, square, prompts)
    for drawn in others:
        ratio = drawn.settings.width / drawn.settings.height
        about = f"Stretch in x against the square picture; 1: none, {ratio:.2f}: squares pulled to the frame."
        estimate = stretch_estimate(drawn.images, square.images, settings.bootstrap)
        measures += [Measure(f"stretch_{drawn.name}", estimate, "one", about=about), *_common(context, drawn, prompts)]
    record = {"prompts": len(prompts), "sizes": [drawn.name for drawn in (square, *others)]}
    return PartResult("aspect", ASPECT.title, measures, galleries=[_gallery([square, *others], prompts)], record=record)


def _drawn(context: Context, prompts: list[str], settings: SamplingSettings) -> _Drawn:
    network = context.data.networks[0]
    jobs = [DrawJob(prompt, context.settings.seed + row, settings) for row, prompt in enumerate(prompts)]
    images = context.images(jobs, f"aspect ratio {settings.width}:{settings.height}")
    return _Drawn(settings, images, network.of_many(images.split(32)).cpu())


def _common(context: Context, drawn: _Drawn, prompts: list[str]) -> list[Measure]:
    """What is measured of every size: distance of the middle square to real ones, and agreement by the head."""
    network, bootstrap = context.data.networks[0], context.settings.bootstrap
    real = context.data.reference.features[network.name]
    about = f"Kernel distance of the middle squares to real ones on {network.name}; compare with the square size."
    estimate = kernel_distance_estimate(real, drawn.features, bootstrap)
    measures = [Measure(f"kernel_{drawn.name}", estimate, "lower", about=about)]
    if _has_head(context):
        ranks = bootstrap.mean(head_ranks(context, drawn.features, prompts))
        about = "Caption rank, as under agreement, of the middle squares."
        measures.append(Measure(f"caption_rank_{drawn.name}", ranks, "higher", about=about, chance=0.5))
    return measures


def _has_head(context: Context) -> bool:
    try:
        check_head(context)
    except UserError:
        return False
    return True


def _gallery(drawn: list[_Drawn], prompts: list[str]) -> Gallery:
    shown = [(row, one) for row in range(min(_SHOWN_PROMPTS, len(prompts))) for one in drawn]
    return Gallery(
        "One prompt and seed a row",
        tuple(as_picture(one.images[row]) for row, one in shown),
        tuple(f"{one.name}: {prompts[row]}" for row, one in shown),
        len(drawn),
    )


ASPECT = Part("aspect", "Aspect ratios", check_networks, _run)
