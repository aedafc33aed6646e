"""`hdm-evaluate compare`, `trainings` and `count`: combine recorded evaluations, and compute sample sizes."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hdm_lightning.cli.arguments import Flags, Parser
from hdm_lightning.cli.command import show_report
from hdm_lightning.evaluation.request import CompareRequest, CountRequest, TrainingsRequest

FLAGS: dict[str, Flags[Any]] = {
    "compare": Flags(CompareRequest, {"first": "A", "second": "B", "primary": "--primary PART.MEASURE,…"}),
    "trainings": Flags(TrainingsRequest, {"runs": "RUN"}),
    "count": Flags(CountRequest, {"share": "SHARE", "other": "OTHER"}),
}

_COMPARE = """Compare two evaluated models image by image: same prompts, seeds and reference images.

A and B are folders or evaluation.json files that hdm-evaluate wrote with the same counts, seed and data. Measures
marked * are primary, a separate family for Holm's correction: choose them before you look. "could show" is the
difference that a comparison with this number of images detects with 80% power."""

_TRAININGS = """Summarize training runs of one recipe that differ only in their seed, and predict one more run.

RUN is a folder, an evaluation.json or a demo.json. The intervals of a single evaluation do not cover other runs; these
are over runs (Student's t). Intervals of shares are computed on the logit, so their center is not the mean. With five
runs, the last column extends about three standard deviations to either side."""

_COUNT = """Compute how many prompts each of two models needs to tell the shares SHARE and OTHER apart.

With --prompts instead of OTHER: how far another model's share must be from SHARE.
Prompts of a combination are correlated: multiply the count by the design effect, 1 + (prompts per combination − 1)
times the correlation within one. More combinations help more than more prompts of each."""


ABOUT = {"compare": _COMPARE, "trainings": _TRAININGS, "count": _COUNT}


def read(name: str, given: Sequence[str]) -> Any:
    """Return the parsed request of `hdm-evaluate NAME`."""
    parser = Parser(f"hdm-evaluate {name}", description=ABOUT[name])
    FLAGS[name].add(parser)
    return FLAGS[name].read(parser.parse_args(given))


def compare(given: Sequence[str]) -> int:
    """Compare two evaluations; print and write the result."""
    request = read("compare", given)
    from hdm_lightning.evaluation.model_comparison import compare_models, comparison_table  # noqa: PLC0415
    from hdm_lightning.evaluation.recorded_numbers import read_recorded  # noqa: PLC0415

    first, second = (read_recorded(path, request.weights) for path in (request.first, request.second))
    found = compare_models(first, second, primary=request.asked, margin=request.margin, confidence=request.confidence)
    apart = [f"not compared: {part}: {reason}" for part, reason in found.apart.items()]
    show_report(comparison_table(found), found.to_json(), request.out, below=apart)
    return 0


def trainings(given: Sequence[str]) -> int:
    """Summarize the evaluations of several training runs."""
    request = read("trainings", given)
    from hdm_lightning.evaluation.model_comparison import summarise_trainings, trainings_table  # noqa: PLC0415
    from hdm_lightning.evaluation.recorded_numbers import read_recorded  # noqa: PLC0415

    runs = [read_recorded(path, request.weights) for path in request.runs]
    found = summarise_trainings(runs, request.confidence)
    measures = {name: asdict(measure) for name, measure in found.items()}
    content = {"runs": [str(run.path) for run in runs], "confidence": request.confidence, "measures": measures}
    few = f"{len(runs)} training runs: the last column is wide because they are few; use 5 to 8"
    below = [few] if len(runs) < 5 else []
    show_report(trainings_table(found, request.confidence), content, request.out, below=below)
    return 0


def count(given: Sequence[str]) -> int:
    """Print how many prompts are needed to tell two shares apart."""
    request = read("count", given)
    from hdm_lightning.metrics.comparisons import images_to_tell, smallest_difference  # noqa: PLC0415

    options = {"power": request.power, "confidence": request.confidence, "design_effect": request.design_effect}
    if request.other is None:
        least = smallest_difference(request.share, request.prompts or 1, **options)
        print(
            f"{request.prompts} prompts per model tell {request.share:g} from shares at least {least:.3g} away with "
            f"{request.power:.0%} power"
        )
        return 0
    needed = images_to_tell(request.share, request.other, **options)
    test = f"two-sided, {1 - request.confidence:.2g}; design effect {request.design_effect:g}"
    print(
        f"{needed} prompts per model tell {request.share:g} from {request.other:g} with {request.power:.0%} power "
        f"({test}; fewer if both models use the same prompts and agree on most)"
    )
    return 0
