"""The tab that plans."""

import html
from typing import Any

import gradio as gr

from hdm_lightning.app.page_errors import told
from hdm_lightning.app.plan_choices import COLUMNS, PAPER, cards, experiments, plan

MORE = {
    "dataset.images": "images in the dataset (0: default)",
    "dataset.caption_tokens": "tokens per caption (0: default)",
    "gpu.usd_per_hour": "rent per card, $/h (0: default)",
}


class PlanTab:
    """Experiment, cards and budget, and the forecast of `hdm-plan` for them."""

    def build(self) -> None:
        """Add the tab's components to the current context."""
        with gr.Row():
            self.experiment = gr.Dropdown(
                experiments(), value=PAPER, label="experiment", elem_id="experiment", allow_custom_value=True
            )
            self.count = gr.Number(label="cards", value=4, precision=0, elem_id="cards", min_width=80)
            self.card = gr.Dropdown(
                cards(), value="5090", label="card", elem_id="card", allow_custom_value=True, min_width=120
            )
            self.budget = gr.Number(label="budget, $ (0: none)", value=0, elem_id="budget")
        with gr.Row():
            self.more = {key: gr.Number(label=label, value=0) for key, label in MORE.items()}
            self.go = gr.Button("Plan", variant="primary", elem_id="plan", elem_classes="beside")
        self.table = gr.Dataframe(headers=list(COLUMNS), label="stages", interactive=False, elem_id="plan-table")
        self.command = gr.Textbox(
            label="the same in a terminal", interactive=False, buttons=["copy"], elem_id="plan-command"
        )
        self.text = gr.HTML(label="full forecast", elem_id="plan-text", elem_classes="plain")
        inputs = [self.experiment, self.card, self.count, self.budget, *self.more.values()]
        self.go.click(told(self.forecast), inputs, [self.table, self.command, self.text], api_name="plan")

    def forecast(self, experiment: str, card: str, count: Any, budget: Any, *more: Any) -> dict[Any, Any]:
        """Return a forecast, or a schedule for the budget."""
        found = plan(experiment, card, count, budget, dict(zip(self.more, more, strict=True)))
        return {
            self.table: [list(row) for row in found.rows],
            self.command: found.command,
            self.text: f"<pre>{html.escape(found.text)}</pre>",
        }
