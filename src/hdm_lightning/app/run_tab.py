"""The tab that shows a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from hdm_lightning.app.page_errors import told
from hdm_lightning.app.run_history import Curves, Run, StageRow, remainder
from hdm_lightning.app.shelf import chosen, find_runs, newest
from hdm_lightning.training.callbacks.progress_bar import duration

STAGES = ["stage", "px", "samples", "of", "state", "time", "device-hours", "$", "validation loss"]
LEDGER = ["time", "event", "stage", "samples", "seconds", "device-hours", "$", "memory GB", "reason"]
COLUMNS = ["curve", "samples", "value"]


class RunTab:
    """Stages, curves, samples and ledger of a run, one of those in and below some folders."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    def build(self, tab: gr.Tab) -> None:
        """Add the tab's components to the current context; opening the tab fills them."""
        with gr.Row():
            self.run = gr.Dropdown([], label="run", scale=5, elem_id="run", allow_custom_value=True)
            self.again = gr.Button("Read again", scale=1, elem_id="read-run", elem_classes="beside")
        self.left = gr.Textbox(label="spent and left", interactive=False, elem_id="left")
        self.stages = gr.Dataframe(headers=STAGES, label="stages", interactive=False, wrap=True, elem_id="stages")
        self.names = gr.Dropdown([], multiselect=True, label="curves", elem_id="curves", allow_custom_value=True)
        self.plot = gr.LinePlot(
            pd.DataFrame(columns=COLUMNS), x="samples", y="value", color="curve", height=320, elem_id="plot"
        )
        self.samples = gr.Gallery(
            label="samples over time",
            columns=4,
            height=600,
            object_fit="contain",
            elem_id="samples",
            interactive=False,
        )
        with gr.Accordion("Ledger", open=False):
            self.ledger = gr.Dataframe(headers=LEDGER, show_label=False, interactive=False, elem_id="ledger")
        parts = [self.left, self.stages, self.names, self.plot, self.samples, self.ledger]
        tab.select(told(self.list_runs), [self.run], [self.run], show_progress="hidden")
        self.run.change(told(self.read), [self.run], parts, api_name="run")
        self.again.click(told(self.list_runs), [self.run], [self.run]).then(told(self.read), [self.run], parts)
        self.names.input(told(self.curves), [self.run, self.names], [self.plot])

    def list_runs(self, shown: str | None = None) -> Any:
        """Return the current names of all runs, and choose the newest unless one is shown."""
        runs = find_runs(self.folders)
        return gr.update(choices=list(runs), value=(shown or newest(runs)) if runs else None)

    def read(self, name: str | None) -> Any:
        """Return everything that the tab shows of a run."""
        if not name:
            return gr.skip()
        run = self._run(name)
        curves, left = run.curves(), remainder(run)
        usual = curves.usual()
        return {
            self.left: left.text() if left else "nothing recorded yet",
            self.stages: [_stage_cells(row) for row in run.stages()],
            self.names: gr.update(choices=list(curves.points), value=usual),
            self.plot: _frame(curves, usual),
            self.samples: run.samples(),
            self.ledger: run.ledger_rows()[::-1],
        }

    def curves(self, name: str, wanted: Sequence[str]) -> pd.DataFrame:
        """Return the points of the chosen curves."""
        return _frame(self._run(name).curves(), wanted or [])

    def _run(self, name: str) -> Run:
        return Run(chosen(find_runs(self.folders), name, "run"))


def _frame(curves: Curves, names: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(curves.of([str(name) for name in names]), columns=COLUMNS)


def _stage_cells(row: StageRow) -> list[str]:
    losses = ", ".join(f"{name} {value:.4f}" for name, value in row.validation.items())
    return [
        row.plan.name,
        str(row.plan.settings.resolution),
        f"{row.samples:,}",
        f"{row.plan.samples:,}",
        row.state,
        duration(row.seconds),
        f"{row.device_hours:.2f}",
        f"{row.cost_usd:.2f}",
        losses,
    ]
