"""An evaluation as a table in the terminal."""

from rich.markup import escape
from rich.table import Table

from hdm_lightning.evaluation.results import Evaluation, Measure, rounded
from hdm_lightning.printable import in_one_line

ARROWS = {"lower": "↓", "higher": "↑", "one": "→ 1", "zero": "→ 0", "none": ""}


def result_table(evaluation: Evaluation) -> Table:
    """One row a measure; value and interval for each set of weights."""
    weights = list(evaluation.results)
    table = Table(title=None, header_style="bold")
    table.add_column("measure", overflow="fold")  # names give way where the terminal is narrow, numbers never
    table.add_column("", no_wrap=True)
    for name in weights:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("interval", justify="right", style="dim", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    for part, title in evaluation.parts():
        table.add_section()
        table.add_row(f"[bold]{escape(in_one_line(title))}[/bold]")
        for name in measure_names(evaluation, part):
            found = [measure_of(evaluation, each, part, name) for each in weights]
            cells = [cell for one in found for cell in (rounded(one.estimate) if one else ("", ""))]
            known = next(one for one in found if one)
            table.add_row(escape(in_one_line(f"  {name}")), ARROWS[known.better], *cells, str(known.estimate.samples))
    return table


def measure_names(evaluation: Evaluation, part: str) -> list[str]:
    """Names of a part's measures over all weights, in order."""
    parts = (evaluation.of(weights, part) for weights in evaluation.results)
    return list(dict.fromkeys(measure.name for one in parts if one for measure in one.measures))


def measure_of(evaluation: Evaluation, weights: str, part: str, name: str) -> Measure | None:
    """One measure of one set of weights."""
    result = evaluation.of(weights, part)
    return next((measure for measure in result.measures if measure.name == name), None) if result else None
