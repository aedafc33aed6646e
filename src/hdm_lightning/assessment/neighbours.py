"""Part `neighbours`: precision, recall, density and coverage on the first feature network."""

from hdm_lightning.assessment.context import Context
from hdm_lightning.assessment.part import Part
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.results import Measure, PartResult
from hdm_lightning.metrics.neighbours import MOST_SAMPLES, NEIGHBOURS, neighbour_estimates

_ABOUT = {
    "precision": "Share of drawn pictures that lie in the neighbourhood of a real one: quality.",
    "recall": "Share of real pictures that lie in the neighbourhood of a drawn one: variety.",
    "density": "Real neighbourhoods that a drawn picture lies in, over k; about 1 for real ones, and may exceed it.",
    "coverage": "Share of real pictures whose neighbourhood holds a drawn one: variety.",
}


def _check(context: Context) -> None:
    context.data.require_networks()
    fewest = min(context.settings.samples, context.data.reference_count)
    if fewest <= NEIGHBOURS:
        raise UserError(
            f"{NEIGHBOURS} neighbours need more than {NEIGHBOURS} pictures of each kind, there are {fewest}",
            where="--samples",
            hint=f"give --samples {10 * NEIGHBOURS} and as many reference pictures",
        )


def _run(context: Context) -> PartResult:
    network, reference = context.data.networks[0], context.data.reference
    _check(context)  # again: now it is known how many of the reference pictures can be read
    real, drawn = (pictures.features[network.name] for pictures in (reference, context.drawn))
    found = neighbour_estimates(real.to(network.device), drawn.to(network.device), context.settings.set_bootstrap)
    measures = [Measure(name, estimate, "higher", about=_ABOUT[name]) for name, estimate in found.items()]
    record = {"network": network.name, "neighbours": NEIGHBOURS, "most_samples": MOST_SAMPLES}
    return PartResult("neighbours", NEIGHBOUR_MEASURES.title, measures, record=record)


NEIGHBOUR_MEASURES = Part("neighbours", "Precision, recall, density, coverage", _check, _run)
