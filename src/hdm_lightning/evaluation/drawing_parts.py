"""Parts that compare generated images with each other: diversity, aspect ratios, camera."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.caption_parts import head_is_valid, head_ranks
from hdm_lightning.evaluation.context import Context, agreement_head, feature_networks, holds, needs
from hdm_lightning.evaluation.findings import Found, Gallery, Group, Measure, Outcomes
from hdm_lightning.evaluation.image_sets import pixels
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.metrics.distances import diversity_estimates, kernel_distance_estimate
from hdm_lightning.metrics.geometric_response import content_shift, shift_response, stretch_estimate, zoom_response

TOLERANCE = 0.5
_SHOWN_PROMPTS = 4


@needs(feature_networks)
def diversity(context: Context) -> Found:
    """Measure how different images of one prompt are."""
    settings = context.settings
    prompts = context.prompts(settings.diversity_prompts, "diversity needs")
    seeds = range(settings.seed, settings.seed + settings.diversity_seeds)
    real = context.real.reference.features[context.network.name]
    if (real == real[0]).all():
        raise UserError("all reference images are equal", where="--data", hint="pass a folder of different images")
    repeated = [prompt for prompt in prompts for _ in seeds]
    images = context.images(repeated, context.sampling, "diversity", [*seeds] * len(prompts))
    by_prompt = context.features_of(images).reshape(len(prompts), len(seeds), -1)
    found = diversity_estimates(by_prompt, real, settings.bootstrap)
    within = "Mean feature distance of images of one prompt, as a share of that of real images; 0: all alike."
    measures = [
        Measure("within_prompt", found["within"], "none", about=within),
        Measure("across_prompts", found["across"], "one", about="The same for images of different prompts."),
        Measure("real_distance", found["real"], "none", about="Mean feature distance of real images: the unit above."),
    ]
    by_seed = {f"seed {seed}": images[number :: len(seeds)] for number, seed in enumerate(seeds)}
    record = {"prompts": len(prompts), "seeds": len(seeds), "network": context.network.name}
    return Found(measures, galleries=[_by_prompt("Each prompt with every seed", prompts, by_seed)], record=record)


def sized(settings: SamplingSettings, ratio: float, multiple: int) -> SamplingSettings:
    """Return settings of about the same area with another width / height, both multiples of `multiple`."""
    side = math.sqrt(settings.height * settings.width)
    width, height = (max(1, round(length / multiple)) * multiple for length in (side * ratio**0.5, side / ratio**0.5))
    return replace(settings, width=width, height=height)


@needs(feature_networks)
def aspect(context: Context) -> Found:
    """Compare images of other aspect ratios with squares of the same prompts and seeds."""
    settings, multiple = context.settings, context.pipeline.size_multiple
    prompts = context.prompts(settings.aspect_prompts, "aspect ratios need")
    sizes = dict.fromkeys(sized(context.sampling, ratio, multiple) for ratio in (1.0, *settings.ratios))
    images: dict[str, Tensor] = {}
    measures = []
    for size in sizes:
        name, ratio = f"{size.width}x{size.height}", size.width / size.height
        images[name] = context.images(prompts, size, f"aspect ratio {size.width}:{size.height}")
        if len(images) > 1:
            about = f"Stretch in x relative to the square image; 1: none, {ratio:.2f}: squares pulled to the frame."
            square = next(iter(images.values()))
            stretch = stretch_estimate(images[name], square, settings.bootstrap)
            measures.append(Measure(f"stretch_{name}", stretch, "one", about=about))
        measures += _of_any_size(context, name, images[name], prompts)
    return Found(
        measures,
        galleries=[_by_prompt("Each prompt and seed in every size", prompts, images)],
        record={"prompts": len(prompts), "sizes": list(images)},
    )


def _of_any_size(context: Context, name: str, images: Tensor, prompts: Sequence[str]) -> list[Measure]:
    """Return what is measured at every size: kernel distance of center squares to real ones, and the caption rank."""
    features, bootstrap = context.features_of(images), context.settings.bootstrap
    real = context.real.reference.features[context.network.name]
    about = f"Kernel distance of the center squares to real ones on {context.network.name}; compare with the square."
    distance = kernel_distance_estimate(real, features, bootstrap)
    measures = [Measure(f"kernel_{name}", distance, "lower", about=about)]
    if holds(agreement_head, context) and head_is_valid(context):
        ranks = bootstrap.mean(head_ranks(context, features, prompts))
        about = "Caption rank, as under agreement, of the center squares."
        measures.append(Measure(f"caption_rank_{name}", ranks, "higher", about=about, chance=0.5))
    return measures


@needs()
def camera(context: Context) -> Found:
    """Measure whether the image moves as x_shift, y_shift and zoom say."""
    settings, sampling = context.settings, context.sampling
    prompts = context.prompts(settings.camera_prompts, "the camera's response needs")
    shift, zoom = settings.camera_shift, settings.camera_zoom
    moves = {"x_shift": shift, "x_shift_back": -shift, "y_shift": shift, "y_shift_back": -shift}
    cameras: dict[str, dict[str, Any]] = {"still": {}}
    cameras |= {name: {name.removesuffix("_back"): amount} for name, amount in moves.items()}
    cameras["zoom"] = {"zoom": zoom}
    images = {
        name: context.images(prompts, replace(sampling, **camera), f"camera {name.replace('_', ' ')}")
        for name, camera in cameras.items()
    }
    measures, outcomes = [], {}
    unrelated = images["still"].roll(1, 0)  # from other prompts and seeds
    for name, amount in moves.items():
        down_right = (0.0, amount) if name.startswith("x") else (amount, 0.0)
        stated = content_shift(down_right, sampling.height, sampling.width)
        response, chance = (shift_response(still, images[name], stated) for still in (images["still"], unrelated))
        measures += _shift_measures(context, name, response, chance, stated)
        outcomes[f"{name}_as_stated"] = Outcomes(_as_stated(response).double().tolist())
    if zoom != 1:
        response, chance = (zoom_response(still, images["zoom"], zoom) for still in (images["still"], unrelated))
        estimate, of_chance = settings.bootstrap.median(response), float(chance.median())
        about = f"Median of log(zoom found) / log({zoom:g}); 1: as stated; chance: of unrelated images, not 0."
        measures.append(Measure("zoom_response", estimate, "one", about=about, chance=of_chance))
    record = {"prompts": len(prompts), "shift": shift, "zoom": zoom, "tolerance": TOLERANCE}
    return Found(
        measures,
        galleries=[_by_prompt("Each prompt and seed under every camera", prompts, images)],
        record=record,
        outcomes=outcomes,
    )


def _as_stated(response: Tensor) -> Tensor:
    """Return which images moved as stated, to within `TOLERANCE` of it in both directions, (N,)."""
    return ((response[:, 0] - 1).abs() <= TOLERANCE) & (response[:, 1].abs() <= TOLERANCE)


def _shift_measures(
    context: Context, name: str, response: Tensor, chance: Tensor, stated: tuple[float, float]
) -> list[Measure]:
    bootstrap, pixels_stated = context.settings.bootstrap, math.hypot(*stated)
    response_about = (
        f"Median displacement of the content along the stated one ({pixels_stated:.1f} px); "
        "1: as stated; chance: of unrelated images."
    )
    share_about = f"Share of images displaced as stated, to within {TOLERANCE:g} of that distance in both directions."
    along, by_chance = response[:, 0], float(chance[:, 0].median())
    as_stated, hits = bootstrap.share(_as_stated(response)), float(_as_stated(chance).double().mean())
    return [
        Measure(f"{name}_response", bootstrap.median(along), "one", about=response_about, chance=by_chance),
        Measure(f"{name}_as_stated", as_stated, "higher", about=share_about, chance=hits),
    ]


def _by_prompt(title: str, prompts: Sequence[str], images: Mapping[str, Tensor]) -> Gallery:
    """Return a gallery of the first prompts, each with its images of every kind."""
    groups = tuple(
        Group(prompt, {kind.replace("_", " "): pixels(of_kind[row]) for kind, of_kind in images.items()})
        for row, prompt in enumerate(prompts[:_SHOWN_PROMPTS])
    )
    return Gallery(title, groups)
