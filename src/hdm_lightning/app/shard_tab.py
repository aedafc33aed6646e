"""The tab that browses shards, and leaves out bad samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image

from hdm_lightning.app.page_errors import told
from hdm_lightning.app.shard_search import Found, Hit, ShardSet, is_markable, left_out, mark, unmark, whole
from hdm_lightning.app.shelf import chosen
from hdm_lightning.app.side_by_side import whole_from
from hdm_lightning.errors import UserError
from hdm_lightning.generation.contact_sheet import contact_sheet

SHOWN = 24
APPEARANCES, ACROSS = 6, 6
MARKS = ["shard", "sample", "reason"]
LARGEST_RESOLUTION = 4096


@dataclass(frozen=True)
class Looking:
    """What one page is looking at: kept on the server, so the page refers to samples only by their position in it."""

    place: str
    words: str
    found: Found
    at: int | None = None


class ShardTab:
    """Search, samples, crops and marks of sets, given as named when the page was started."""

    def __init__(self, places: Sequence[str]) -> None:
        self.places = {place: place for place in places}

    def build(self, blocks: gr.Blocks) -> None:
        """Add the tab's components to the current context."""
        first = next(iter(self.places), None)
        self.looking = gr.State(None)
        with gr.Row():
            self.place = gr.Dropdown(
                list(self.places), value=first, label="set", scale=2, elem_id="set", allow_custom_value=True
            )
            self.words = gr.Textbox(label="words in the caption or key (empty: all samples)", scale=3, elem_id="words")
            self.search = gr.Button("Search", variant="primary", elem_id="search", elem_classes="beside")
            self.more = gr.Button("Continue", elem_id="go-on", elem_classes="beside")
        self.state = gr.Textbox(label="found", interactive=False, elem_id="found")
        with gr.Row():
            with gr.Column(scale=3):
                self.gallery = gr.Gallery(
                    label="samples",
                    columns=6,
                    height=560,
                    object_fit="contain",
                    allow_preview=False,
                    elem_id="hits",
                    interactive=False,
                )
            with gr.Column(scale=2):
                self._build_detail()
        self._build_crops()
        with gr.Accordion("Left out of this set", open=False):
            self.marks = gr.Dataframe(headers=MARKS, show_label=False, interactive=False, wrap=True, elem_id="marks")
            with gr.Row(equal_height=True):
                self.shard = gr.Textbox(label="shard", elem_id="unmark-shard")
                self.ordinal = gr.Number(label="sample", precision=0, elem_id="unmark-sample")
                self.back = gr.Button("Undo a mark made by hand", elem_id="unmark")
        self._connect(blocks)

    def _build_detail(self) -> None:
        self.image = gr.Image(
            label="the whole image", height=260, interactive=False, elem_id="whole", buttons=["fullscreen"]
        )
        self.text = gr.Textbox(label="key and captions", lines=3, interactive=False, elem_id="sample-text")
        with gr.Row():
            self.reason = gr.Textbox(label="what is wrong with it", scale=3, elem_id="reason")
            self.bad = gr.Button("Leave out", variant="stop", elem_id="mark", elem_classes="beside")
        gr.Markdown("Leaving a sample out changes the order of the others: do it between trainings, not during one.")

    def _build_crops(self) -> None:
        with gr.Row():
            self.resolution = gr.Number(label="resolution", value=256, precision=0, min_width=80, elem_id="resolution")
            self.seed = gr.Number(label="seed", value=0, precision=0, min_width=80)
            self.stage = gr.Textbox(label="stage", min_width=80)
            self.flip = gr.Checkbox(label="flip", min_width=60)
            self.crops = gr.Button("Its crops", elem_id="crops", elem_classes="beside")
            self.start = gr.Number(label="place in the order", value=0, precision=0, min_width=80, elem_id="start")
            self.ordered = gr.Button("Order from here", elem_id="order", elem_classes="beside")
        self.seen = gr.Image(
            label="as training will see it: the crop, and below it its place in the image",
            interactive=False,
            elem_id="seen",
            format="png",
            buttons=["download", "fullscreen"],
        )

    def _connect(self, blocks: gr.Blocks) -> None:
        results = [self.looking, self.gallery, self.state]
        detail = [self.looking, self.image, self.text]
        self.search.click(told(self.find), [self.place, self.words], results, api_name="search")
        self.words.submit(told(self.find), [self.place, self.words], results)
        self.more.click(told(self.go_on), [self.looking], results)
        self.gallery.select(told(self.choose), [self.looking], detail)
        options = [self.looking, self.resolution, self.seed, self.stage, self.flip]
        self.crops.click(told(self.crops_of), options, [self.seen])
        self.ordered.click(told(self.order_of), [self.place, *options[1:], self.start], [self.seen])
        marks = [self.state, self.marks]
        self.bad.click(told(self.leave_out), [self.looking, self.reason], [self.looking, *marks], api_name="mark")
        self.back.click(told(self.take_back), [self.place, self.shard, self.ordinal], marks, api_name="unmark")
        self.place.change(told(self.list_marks), [self.place], [self.marks], show_progress="hidden")
        blocks.load(told(self.list_marks), [self.place], [self.marks], show_progress="hidden")

    def find(self, place: str, words: str) -> dict[Any, Any]:
        """Return the first samples with these words."""
        return self._found(chosen(self.places, place, "set"), str(words or ""), 0)

    def go_on(self, looking: Looking | None) -> dict[Any, Any]:
        """Return the next ones."""
        if looking is None or looking.found.next_row is None:
            raise UserError("there are no more samples", where="search", hint="search again")
        return self._found(looking.place, looking.words, looking.found.next_row)

    def _found(self, place: str, words: str, start: int) -> dict[Any, Any]:
        shards = ShardSet(place)
        found = shards.search(words, start=start, limit=SHOWN)
        hits = tuple(hit for hit in found.hits if hit.image is not None)
        broken = len(found.hits) - len(hits)
        looked = f"{start + 1:,} to {start + found.looked_at:,}" if found.looked_at else "none"
        text = f"{len(found.hits)} among samples {looked} of {shards.samples:,}"
        text += f", {broken} of them unreadable (run hdm-shards verify)" if broken else ""
        return {
            self.looking: Looking(place, words, replace(found, hits=hits)),
            self.gallery: gr.update(value=[(hit.image, hit.line) for hit in hits], selected_index=None),
            self.state: text,
        }

    def choose(self, looking: Looking | None, event: gr.SelectData) -> dict[Any, Any]:
        """Show the sample that was clicked."""
        now = looking and replace(looking, at=event.index if isinstance(event.index, int) else None)
        place, hit = _chosen(now)
        raw = ShardSet(place).raw(hit.address)
        lines = [f"{hit.shard}/{hit.key} (sample {hit.address.ordinal})", *hit.captions]
        return {self.looking: now, self.image: whole(raw), self.text: "\n".join(lines)}

    def crops_of(self, looking: Looking | None, *options: Any) -> Any:
        """Return the first views of the chosen sample in a training."""
        place, hit = _chosen(looking)
        shards = ShardSet(place)
        return _sheet(shards.appearances(hit.address, _stream(shards, *options), APPEARANCES))

    def order_of(self, place: str, *options: Any) -> Any:
        """Return what a training will see from a position in its order on."""
        *options, start = options  # type: ignore[assignment]
        shards = ShardSet(chosen(self.places, place, "set"))
        return _sheet(shards.order(_stream(shards, *options), whole_from(start, "place", 0, 1 << 50), SHOWN))

    def leave_out(self, looking: Looking | None, reason: str) -> dict[Any, Any]:
        """Leave the chosen sample out of its set."""
        place, hit = _chosen(looking)
        remain = mark(place, hit.shard, hit.address.ordinal, hit.key, str(reason or ""))
        return {
            self.looking: looking and replace(looking, found=looking.found.without_one()),
            self.state: f"{hit.shard}/{hit.key} is left out, {remain:,} samples remain",
            self.marks: self.list_marks(place),
        }

    def take_back(self, place: str, shard: str, ordinal: Any) -> dict[Any, Any]:
        """Restore a sample that was marked by hand."""
        place = chosen(self.places, place, "set")
        remain = unmark(place, str(shard or "").strip(), whole_from(ordinal, "sample", 0, 1 << 24))
        return {self.state: f"mark undone, {remain:,} samples", self.marks: self.list_marks(place)}

    def list_marks(self, place: str | None) -> list[list[str]]:
        """Return the samples left out of a set."""
        if not place:
            return []
        known = chosen(self.places, place, "set")
        return [[shard, str(ordinal), why] for shard, ordinal, why in left_out(known)] if is_markable(known) else []


def _sheet(seen: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    images, texts = zip(*seen, strict=True)
    return contact_sheet(images, texts, columns=ACROSS, caption_lines=6)


def _chosen(looking: Looking | None) -> tuple[str, Hit]:
    """Return the set and the chosen sample. Raises UserError if there is none."""
    if looking is None or looking.at is None or not 0 <= looking.at < len(looking.found.hits):
        raise UserError("no sample is chosen", where="samples", hint="search, then click one")
    return looking.place, looking.found.hits[looking.at]


def _stream(shards: ShardSet, resolution: Any, seed: Any, stage: Any, flip: Any) -> Any:
    return shards.stream(
        whole_from(resolution, "resolution", 1, LARGEST_RESOLUTION),
        seed=whole_from(seed, "seed", 0, 1 << 53),
        stage=str(stage or "")[:100],
        flip=bool(flip),
    )
