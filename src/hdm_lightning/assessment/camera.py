"""Part `camera`: does the picture move as x_shift, y_shift and zoom say?"""

from dataclasses import replace

from torch import Tensor

from hdm_lightning.assessment.context import Context
from hdm_lightning.assessment.part import Part, nothing_to_check
from hdm_lightning.assessment.pictures import as_picture
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.camera_response import content_shift, shift_response, zoom_response
from hdm_lightning.evaluation.results import Gallery, Measure, PartResult
from hdm_lightning.generation.image_writer import DrawJob
from hdm_lightning.generation.settings import SamplingSettings

TOLERANCE = 0.5
_SHOWN_PROMPTS = 4


def _run(context: Context) -> PartResult:
    settings = context.settings
    prompts = context.prompts(settings.camera_prompts)
    if len(prompts) < 2:
        raise UserError(
            "the camera's response needs two different captions", where="--data", hint="give a folder with captions"
        )
    shift, zoom = settings.camera_shift, settings.camera_zoom
    cameras: dict[str, dict[str, float]] = {
        "still": {},
        "x_shift": {"x_shift": shift},
        "x_shift_back": {"x_shift": -shift},
        "y_shift": {"y_shift": shift},
        "y_shift_back": {"y_shift": -shift},
        "zoom": {"zoom": zoom},
    }
    images = {
        name: _images(context, prompts, replace(context.sampling, **camera), name)  # type: ignore[arg-type]
        for name, camera in cameras.items()
    }
    measures = [measure for name in list(cameras)[1:-1] for measure in _shift_measures(context, name, images)]
    if zoom != 1:
        response = zoom_response(images["still"], images["zoom"], zoom)
        measures.append(
            Measure("zoom_response", settings.bootstrap.median(response), "one", about=_ABOUT_ZOOM.format(zoom=zoom))
        )
    record = {"prompts": len(prompts), "shift": shift, "zoom": zoom, "tolerance": TOLERANCE}
    return PartResult("camera", CAMERA.title, measures, galleries=[_gallery(images, prompts)], record=record)


_ABOUT_SHIFT = (
    "Median displacement of the content along the stated one ({pixels:.1f} px); 1: as stated, 0: the picture stays."
)
_ABOUT_SHARE = f"Share of pictures displaced as stated, to within {TOLERANCE:g} of it in both directions."
_ABOUT_ZOOM = "Median of log(zoom found) / log({zoom:g}); 1: as stated, 0: the picture stays."


def _shift_measures(context: Context, name: str, images: dict[str, Tensor]) -> list[Measure]:
    sign, bootstrap = (-1 if name.endswith("back") else 1), context.settings.bootstrap
    amount = sign * context.settings.camera_shift
    shift = (0.0, amount) if name.startswith("x") else (amount, 0.0)
    stated = content_shift(shift, context.sampling.height, context.sampling.width)
    response = shift_response(images["still"], images[name], stated).cpu()
    near = ((response[:, 0] - 1).abs() <= TOLERANCE) & (response[:, 1].abs() <= TOLERANCE)
    about = _ABOUT_SHIFT.format(pixels=context.settings.camera_shift * context.sampling.height / 2)
    return [
        Measure(f"{name}_response", bootstrap.median(response[:, 0]), "one", about=about),
        Measure(f"{name}_as_stated", bootstrap.share(near), "higher", about=_ABOUT_SHARE),
    ]


def _images(context: Context, prompts: list[str], settings: SamplingSettings, name: str) -> Tensor:
    jobs = [DrawJob(prompt, context.settings.seed + row, settings) for row, prompt in enumerate(prompts)]
    return context.images(jobs, f"camera {name.replace('_', ' ')}")


def _gallery(images: dict[str, Tensor], prompts: list[str]) -> Gallery:
    shown = [(row, name) for row in range(min(_SHOWN_PROMPTS, len(prompts))) for name in images]
    return Gallery(
        "One prompt and seed a row",
        tuple(as_picture(images[name][row]) for row, name in shown),
        tuple(f"{name.replace('_', ' ')}: {prompts[row]}" for row, name in shown),
        len(images),
    )


CAMERA = Part("camera", "Camera", nothing_to_check, _run)
