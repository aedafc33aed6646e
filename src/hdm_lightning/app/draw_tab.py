"""The tab that generates images."""

import secrets
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from hdm_lightning.app.page_errors import told
from hdm_lightning.app.side_by_side import Drawn, Studio, Wanted, number_from, seed_from, settings_from_fields
from hdm_lightning.errors import UserError
from hdm_lightning.generation.sampling_settings import OnIndivisible, SamplingSettings, Solver

LORA_ROWS = 3
KEPT_COPIES = 512
"""Number of generated images that pages can fetch at a time; all of them stay in the output folder."""
_DRAWN = "-drawn"
NO_LORA = "none"
DEFAULTS = SamplingSettings()
_NUMBERS = {
    "steps": "steps",
    "shift": "shift",
    "guidance_scale": "guidance",
    "low": "guidance from time (0: the image)",
    "high": "guidance to time (1: noise)",
    "routing_scale": "routing guidance (1: none)",
    "weak_rate": "tokens routed in its weak branch",
    "conditional_rate": "tokens routed with the prompt",
    "unconditional_rate": "tokens routed without it",
    "x_shift": "shift right (1: half a square image)",
    "y_shift": "shift down",
    "zoom": "zoom in",
}
_GROUPS = {
    "Camera": ("x_shift", "y_shift", "zoom"),
    "Routing and guidance": ("low", "high", "routing_scale", "weak_rate", "conditional_rate", "unconditional_rate"),
}


class DrawTab:
    """Form, gallery, and what happens between them.

    Args:
        studio: generates the images.
        served: the folder whose files the page may fetch.
    """

    def __init__(self, studio: Studio, served: Path) -> None:
        self.studio, self.served = studio, served
        self._stopped: set[str] = set()
        self._at_work: set[str] = set()

    def build(self, blocks: gr.Blocks) -> None:
        """Add the tab's components to the current context."""
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                self._build_form()
            with gr.Column(scale=3, min_width=400):
                self.gallery = gr.Gallery(
                    label="one row per seed, one column per model",
                    elem_id="drawn",
                    columns=2,
                    height=720,
                    object_fit="contain",
                    buttons=["download", "fullscreen"],
                    interactive=False,
                )
                self.notes = gr.Textbox(label="notes", interactive=False, visible=False, elem_id="notes")
                self.files = gr.File(label="images, each with its settings", file_count="multiple", elem_id="files")
                self.commands = gr.Textbox(
                    label="generate them again", lines=2, interactive=False, buttons=["copy"], elem_id="commands"
                )
        self._connect(blocks)

    def _build_form(self) -> None:
        self.models = gr.Dropdown(
            [], multiselect=True, label="models (several: side by side)", elem_id="models", allow_custom_value=True
        )
        self.prompt = gr.Textbox(label="prompt", lines=2, elem_id="prompt")
        self.negative = gr.Textbox(label="negative prompt", elem_id="negative")
        self.numbers: dict[str, gr.Number] = {}
        with gr.Row():
            self.width = _number("width", DEFAULTS.width)
            self.height = _number("height", DEFAULTS.height)
            self.seed = gr.Textbox(label="first seed", value="0", elem_id="seed", min_width=90)
            self.count = _number("images", 1)
        with gr.Row():
            self._add_number("steps")
            self._add_number("guidance_scale")
            self.solver = gr.Dropdown(list(get_args(Solver)), value=DEFAULTS.solver, label="solver", min_width=90)
            self._add_number("shift")
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="draw")
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop")
        for title, names in _GROUPS.items():
            with gr.Accordion(title, open=False), gr.Row():
                for name in names:
                    self._add_number(name)
        with gr.Accordion("LoRAs", open=False):
            self.loras = [self._lora_row(number) for number in range(LORA_ROWS)]
        with gr.Accordion("Sizes that do not fit", open=False):
            self.indivisible = gr.Radio(list(get_args(OnIndivisible)), value=DEFAULTS.on_indivisible, show_label=False)
        self.dropped = gr.File(label="settings from an image", file_types=[".png"], elem_id="dropped", height=160)

    def _add_number(self, name: str) -> None:
        low, high = DEFAULTS.guidance_interval
        start = {"low": low, "high": high}.get(name)
        self.numbers[name] = _number(_NUMBERS[name], getattr(DEFAULTS, name) if start is None else start, name)

    def _lora_row(self, number: int) -> tuple[gr.Dropdown, gr.Number]:
        with gr.Row():
            name = gr.Dropdown([NO_LORA], value=NO_LORA, label="LoRA", scale=3, allow_custom_value=True)
            return name, _number("weight", 1.0, f"lora{number}")

    def _connect(self, blocks: gr.Blocks) -> None:
        lists = [self.models, *(name for name, _ in self.loras)]
        own = [self.width, self.height, self.solver, *self.numbers.values()]
        loras = [part for row in self.loras for part in row]
        form = [self.models, self.prompt, self.negative, self.seed, self.count, self.indivisible, *own, *loras]
        blocks.load(told(self.lists), None, lists, show_progress="hidden").then(
            told(self.own_settings), [self.models], own, show_progress="hidden"
        )
        self.models.input(told(self.own_settings), [self.models], own, show_progress="hidden")
        self.dropped.upload(told(self.from_picture), [self.dropped], [*form, self.notes])
        begun = self.go.click(told(self.begin), None, None, queue=False, show_progress="hidden")
        begun.then(
            told(self.draw),
            set(form),
            [self.gallery, self.files, self.commands, self.notes],
            api_name="draw",
            concurrency_id="models",
            concurrency_limit=1,
        )
        self.stop.click(told(self.ask_to_stop), None, None, queue=False)

    def lists(self) -> dict[Any, Any]:
        """Return the current names of models and LoRAs; the first model is selected."""
        models, loras = list(self.studio.models()), [NO_LORA, *self.studio.loras()]
        found = {self.models: gr.update(choices=models, value=models[:1])}
        return found | {name: gr.update(choices=loras) for name, _ in self.loras}

    def own_settings(self, models: Sequence[str] | None) -> Any:
        """Return the default settings of the first chosen model."""
        return self._values(self.studio.settings_of(models[0])) if models else gr.skip()

    def from_picture(self, file: str | None) -> Any:
        """Return the form filled in from the record of an image, with notes on what is not available here."""
        if not file:
            return gr.skip()
        wanted, notes = self.studio.settings_from(Path(file))
        if len(wanted.loras) > LORA_ROWS:
            notes.append(f"it was generated with {len(wanted.loras)} LoRAs, but this form only has {LORA_ROWS}")
        settings = {**(wanted.settings or {}), "width": wanted.width, "height": wanted.height}
        loras = [*wanted.loras, *([(NO_LORA, 1.0)] * LORA_ROWS)]
        return {
            **({self.models: list(wanted.models)} if wanted.models else {}),
            self.prompt: wanted.prompt,
            self.negative: settings["negative_prompt"],
            self.seed: str(wanted.seed),
            self.count: 1,
            self.indivisible: settings["on_indivisible"],
            **self._values(settings),
            **{
                part: value
                for row, lora in zip(self.loras, loras, strict=False)
                for part, value in zip(row, lora, strict=True)
            },
            self.notes: _notes(notes or ["all of its settings are in the form"]),
        }

    def _values(self, settings: dict[str, Any]) -> dict[Any, Any]:
        low, high = settings["guidance_interval"]
        own = {**settings, "low": low, "high": high}
        fixed = {self.width: own["width"], self.height: own["height"], self.solver: own["solver"]}
        return fixed | {part: own[name] for name, part in self.numbers.items()}

    def draw(
        self,
        form: dict[Any, Any],
        request: gr.Request,
        progress: Any = gr.Progress(),  # noqa: B008  (gradio's convention)
    ) -> Iterator[dict[Any, Any]]:
        """Generate the images that the form describes; yield them after each model."""
        session = str(request.session_hash)
        notes: list[str] = []

        def report(what: str, done: int, total: int) -> None:
            self._require_wanted(session)
            progress((done, total), desc="generating")

        try:
            self._require_wanted(session)
            for drawn in self.studio.draw(self._wanted(form), warn=notes.append, progress=report):
                yield self._shown(drawn, notes)
        finally:
            self._at_work.discard(session)

    def begin(self, request: gr.Request) -> None:
        """Forget an earlier Stop of this page, unless it still has to end a request that is running or in the queue.

        Runs outside the queue, so that a Stop counts while a request waits there.
        """
        session = str(request.session_hash)
        if session not in self._at_work:
            self._stopped.discard(session)
        self._at_work.add(session)

    def _require_wanted(self, session: str) -> None:
        if session in self._stopped:
            raise UserError("stopped", hint="find the finished images in the output folder")

    def _wanted(self, form: dict[Any, Any]) -> Wanted:
        numbers = {name: form[part] for name, part in self.numbers.items()}
        interval = numbers.pop("low"), numbers.pop("high")
        settings = settings_from_fields(numbers) | {
            "guidance_interval": tuple(float(number_from(time, "guidance times")) for time in interval),
            "negative_prompt": str(form[self.negative] or ""),
            "solver": form[self.solver],
            "on_indivisible": form[self.indivisible],
        }
        rows = [(form[name], float(number_from(form[weight], "LoRA weight"))) for name, weight in self.loras]
        return Wanted(
            prompt=str(form[self.prompt] or ""),
            models=form[self.models] or [],
            width=int(number_from(form[self.width], "width", whole=True)),
            height=int(number_from(form[self.height], "height", whole=True)),
            seed=seed_from(form[self.seed]),
            count=int(number_from(form[self.count], "images", whole=True)),
            loras=[(name, weight) for name, weight in rows if name and name != NO_LORA],
            settings=settings,
        )

    def _shown(self, drawn: Sequence[Drawn], notes: Sequence[str]) -> dict[Any, Any]:
        models = len({each.model for each in drawn})
        files = [self._served(each.path) for each in drawn]
        captions = [f"seed {each.seed}" + (f" · {each.model}" if models > 1 else "") for each in drawn]
        again = "\n".join(f"hdm-sample --repeat {shlex.quote(str(each.path))}" for each in drawn)
        return {
            self.gallery: gr.update(
                value=list(zip(files, captions, strict=True)), columns=_columns(models, len(drawn))
            ),
            self.files: files,
            self.commands: again,
            self.notes: _notes(notes),
        }

    def _served(self, path: Path) -> str:
        """Copy an image to where the page may fetch it, unchanged and with its name; delete the oldest copies."""
        for old in sorted(self.served.glob(f"*{_DRAWN}"), key=lambda each: each.stat().st_mtime)[: 1 - KEPT_COPIES]:
            shutil.rmtree(old, ignore_errors=True)
        folder = self.served / f"{secrets.token_hex(16)}{_DRAWN}"
        folder.mkdir()
        return str(shutil.copy(path, folder / path.name))

    def ask_to_stop(self, request: gr.Request) -> None:
        """Stop the sampling of this page at its next step."""
        self._stopped.add(str(request.session_hash))


def _notes(notes: Sequence[str]) -> Any:
    """Return the notes, or hide their field if there are none."""
    return gr.update(value="\n".join(dict.fromkeys(notes)), visible=bool(notes))


def _columns(models: int, images: int) -> int:
    """Return one column per model; for a single model, as many as fit well in a row."""
    return models if models > 1 else max(1, min(4, images))


def _number(label: str, value: float, name: str = "") -> gr.Number:
    """Return a field that rounds nothing, so that the settings of an image are restored exactly."""
    return gr.Number(label=label, value=value, min_width=90, elem_id=name or label, precision=None)
