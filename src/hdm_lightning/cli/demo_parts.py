"""The demo's parts: shards of shapes, a small EQ-VAE, a small XUT, images, and prompt-following scores."""

import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hdm_lightning.autoencoding.perceptual import require_perceptual
from hdm_lightning.cli.command import progress_bars
from hdm_lightning.datasets.shapes import Prompt, build_shapes, rule_of_build, scene_prompts
from hdm_lightning.datasets.shapes_scenes import Split
from hdm_lightning.encoders.pretrained import locate_model
from hdm_lightning.encoders.text import MODEL_FILES
from hdm_lightning.generation.contact_sheet import contact_sheet
from hdm_lightning.generation.image_files import to_pil
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.generation.scoring import draw_and_score, score_decoded
from hdm_lightning.json_files import read_object
from hdm_lightning.metrics.prompt_following import Graded, gap, in_words
from hdm_lightning.models import XUT
from hdm_lightning.training.job import check_job
from hdm_lightning.training.launch import launch
from hdm_lightning.training.schedule import run_schedule
from hdm_lightning.whole_files import write_atomically, write_json

RESULT = "demo.json"
SPLITS: dict[str, Split] = {"unseen": "heldout", "seen": "train"}
SCORED = "pictures and score"
FORMAT = "hdm-lightning demo 2"
"""Format of the scores; a folder with another format is scored again."""


def demo_processes() -> int:
    """Return 1 on a GPU, else 2 with two or more CPU cores: small layers gain little from a second thread."""
    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def run_demo(folder: Path, config: dict[str, Any], autoencoder: DictConfig, model: DictConfig) -> int:
    """Run the parts that are not done yet, show the result and return the exit status.

    Args:
        folder: output folder of all parts.
        config: conf/demo.yaml.
        autoencoder, model: composed configurations of hdm-train-vae and hdm-train.

    Raises:
        UserError: a network that one of the parts needs is not available.
    """
    parts: list[tuple[str, Callable[[], int]]] = [
        ("shards", lambda: _build_shards(folder / "shards", config)),
        ("autoencoder", lambda: _train(autoencoder)),
        ("model", lambda: _train(model)),
        (SCORED, lambda: _draw(folder, config)),
    ]
    result = _read(folder)
    if result.get("format") != FORMAT:
        result["seconds"].pop(SCORED, None)
    if not {"autoencoder", "model"} <= set(result["seconds"]):
        _require_networks(autoencoder, model)
    for number, (name, part) in enumerate(parts, start=1):
        if name in result["seconds"]:
            continue
        Console().rule(f"{number}/{len(parts)} {name}", align="left")
        begin = time.monotonic()
        status = part()
        if status:
            return status
        result = _read(folder)
        result["seconds"][name] = time.monotonic() - begin
        write_json(folder / RESULT, result)
    _show(folder, result)
    return 0


def _require_networks(autoencoder: DictConfig, model: DictConfig) -> None:
    """Raise UserError if a network that a later part needs is missing, before the first part spends minutes."""
    locate_model(model["text_encoder"]["name"], where="text_encoder.name", required=MODEL_FILES)
    if perceptual := autoencoder["loss"]["perceptual_network"]:
        require_perceptual(perceptual)


def _build_shards(folder: Path, config: dict[str, Any]) -> int:
    options = {**config["shapes"], "objects": {int(k): v for k, v in config["shapes"]["objects"].items()}}
    build_shapes(folder, seed=config["seed"], **options)
    return 0


def _train(config: DictConfig) -> int:
    job = check_job(config)
    return launch(run_schedule, job.order(), job.processes)


def _draw(folder: Path, config: dict[str, Any]) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_pipeline(folder / "model", LoadOptions(device=device, max_batch=64))
    settings = SamplingSettings.from_json(loaded.sampling)
    _draw_sheet(folder, loaded.pipeline, settings, config["pictures"])
    blank = _untrained(loaded.pipeline, config["seed"])
    rule = rule_of_build(folder / "shards")
    result = {**_read(folder), "format": FORMAT, "seed": config["seed"], "held_out": rule, "scores": {}, "outcomes": {}}
    for objects, (name, key) in enumerate((("one", "single"), ("two", "pairs")), start=1):
        prompts = {
            kind: scene_prompts(config["score"][key], split=split, objects=objects, rule=rule)
            for kind, split in SPLITS.items()
        }
        graded = _all_graded(loaded.pipeline, blank, settings, prompts, f"{name} object{'s' * (objects > 1)}")
        seen, unseen = (graded[kind].estimates() for kind in ("seen", "unseen"))
        gaps = {criterion: asdict(gap(seen[criterion], unseen[criterion])) for criterion in unseen}
        result["scores"][name] = {**{kind: each.scores() for kind, each in graded.items()}, "gap": gaps}
        result["outcomes"][name] = {kind: graded[kind].to_json() for kind in SPLITS}
    write_json(folder / RESULT, result)
    return 0


def _all_graded(
    trained: HDMPipeline, blank: HDMPipeline, settings: SamplingSettings, prompts: dict[str, list[Prompt]], name: str
) -> dict[str, Graded]:
    """Score seen and unseen prompts with the trained network, unseen ones with an untrained one and decoded answers."""
    unseen = prompts["unseen"]
    answers = [prompt.image(settings.height) for prompt in unseen]
    return {
        **{kind: _graded(trained, settings, asked, f"{name}, {kind}") for kind, asked in prompts.items()},
        "untrained": _graded(blank, settings, unseen, f"{name}, untrained"),
        "decoded": score_decoded(trained, answers, [prompt.spec for prompt in unseen]),
    }


def _untrained(trained: HDMPipeline, seed: int) -> HDMPipeline:
    """Return the same pipeline with an untrained network."""
    torch.manual_seed(seed)
    network = XUT(trained.network.config).to(trained.device)
    return trained.with_network(network)


def _draw_sheet(folder: Path, pipeline: HDMPipeline, settings: SamplingSettings, config: dict[str, Any]) -> None:
    prompts: list[str] = config["prompts"]
    images: list[Tensor] = []
    for height, width in config["sizes"]:
        sized = SamplingSettings.from_json({**settings.to_json(), "height": height, "width": width})
        images += list(pipeline.draw(prompts, list(range(len(prompts))), sized))
    captions = prompts * len(config["sizes"])
    sheet = contact_sheet([to_pil(image) for image in images], captions, columns=len(prompts))
    write_atomically(folder / "samples.png", lambda file: sheet.save(file, "PNG"))


def _graded(pipeline: HDMPipeline, settings: SamplingSettings, prompts: list[Prompt], name: str) -> Graded:
    captions, specs = [prompt.caption for prompt in prompts], [prompt.spec for prompt in prompts]
    with progress_bars() as progress:
        return draw_and_score(pipeline, captions, specs, settings, progress=partial(progress, name)).graded


_LEGEND = """
unseen: correct images of color and shape pairs held out of training
gap: seen minus unseen; best: correct images still correct after the autoencoder
Intervals are over pairs, for this training run only. To compare another run:
  hdm-demo run_dir=runs/demo_1 seed=1
  hdm-evaluate trainings runs/demo runs/demo_1
"""


def score_table(scores: dict[str, Any]) -> Table:
    """Return a table of unseen combinations per criterion, next to seen ones, autoencoder limit, chance and untrained.

    It fits 80 columns; the gap only has an interval, since its value is the difference of two columns.
    """
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in ("", "unseen", "95%", "seen", "gap, 95%", "best", "chance", "untrained"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, kinds in scores.items():
        table.add_row(f"[bold]{name} object{'s' if name == 'two' else ''}")
        for criterion, score in kinds["unseen"].items():
            seen, untrained, most = (kinds[kind][criterion]["share"] for kind in ("seen", "untrained", "decoded"))
            between = kinds["gap"][criterion]
            table.add_row(
                in_words(criterion),
                f"{score['right']} of {score['trials']}",
                f"{100 * score['low']:.0f}–{score['high']:.0%}",
                f"{seen:.0%}",
                f"{round(100 * between['low']):+d} to {round(100 * between['high']):+d}%",
                f"{most:.0%}",
                f"{score['chance']:.0%}",
                f"{untrained:.0%}",
            )
        table.add_section()
    return table


def _show(folder: Path, result: dict[str, Any]) -> None:
    Console().print(score_table(result["scores"]))
    print(_LEGEND)
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())
    print(f"time: {times}; {sum(result['seconds'].values()) / 60:.1f} minutes in total")
    print(f"images:   {folder / 'samples.png'}")
    print(f"watch:    tensorboard --logdir {shlex.quote(str(folder))}")
    prompt = "a small green triangle on a white background"
    print(f'sample:   hdm-sample {shlex.quote(str(folder / "model"))} "{prompt}"')


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RESULT
    if not path.exists():
        return {"seconds": {}}
    return {"seconds": {}, **read_object(path, hint="delete it; parts that are done are recognized")}
