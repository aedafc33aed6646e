"""Status messages of a run: four lines at its start, one at each stage's end, two at the end of the run."""

import os
import shlex
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from hdm_lightning.training import hardware, run_folder
from hdm_lightning.training.callbacks.keep_ledger import Ledger
from hdm_lightning.training.callbacks.progress_bar import duration
from hdm_lightning.training.composition import plain
from hdm_lightning.training.modules.adapted_layers import is_adapted
from hdm_lightning.training.rewind import StartPoint
from hdm_lightning.training.run_log import say
from hdm_lightning.training.run_recipe import Run, with_stage
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.strategies import processes


def announce_start(run: Run, plan: StagePlan, start: StartPoint, data: Any) -> None:
    """Print what is trained, where and on which data, and how it starts; once per process. Every process calls this.

    The indices of the stage's data module are read here.
    """
    if run.parts.setdefault("announced", False):
        return
    run.parts["announced"] = True
    size = getattr(getattr(data, "train_plan", None), "samples", None)
    if processes.rank() == 0:
        lines = {"model": _model(run), "device": _device(run), "data": _data(run, plan, size)}
        lines["run"] = _folder(run, plan, start)
        say("\n".join(f"{name:<7} {text}" for name, text in lines.items()))
        for note in getattr(data, "notes", list)():
            say(f"warning: {note}")
        if run.config.hardware.compile:
            say("the first steps compile the network, which takes a minute or two")


def announce_stage_end(run: Run, plan: StagePlan, summary: dict[str, Any]) -> None:
    """Print the result of a stage and what comes next; the first process calls this."""
    book = Ledger(run.run_dir / run_folder.LEDGER, writes=False)
    dollars = book.spent("cost_usd", plan.name)
    parts = [f"{summary['samples']:,} samples", run.recipe.outcome(summary)]
    parts += [duration(book.spent("seconds", plan.name)), f"${dollars:,.2f}" if dollars else ""]
    later = run.plans[plan.number :]
    if later:
        following = later[0]
        comes = f"next: {following.name}, {following.samples:,} samples at {following.settings.resolution} px"
    else:
        comes = f"next: writing {shown(run.run_dir / run_folder.FINAL)}"
    say(f"{plan.name} is done: {' · '.join(part for part in parts if part)}; {comes}")


def announce_end(run: Run) -> None:
    """Print where the result is and what to do with it; the first process calls this."""
    final = run.run_dir / run_folder.FINAL
    if final.is_dir():
        say(f"result  {shown(final)}\nnext    {run.recipe.next_command(run, shown(run.run_dir))}")


def shown(path: Path) -> str:
    """Return a path as a user would type it here: relative if it is below the working folder."""
    absolute, here = path.absolute(), Path.cwd()
    plain = Path(os.path.normpath(absolute))  # without `..`, which may lead elsewhere after a link
    absolute = plain if plain.exists() and plain.samefile(absolute) else absolute
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def shown_source(source: str) -> str:
    """Return where data come from: a folder as a user would type it here, an address unchanged."""
    return shown(Path(source)) if Path(source).exists() else source


def _model(run: Run) -> str:
    parameters = sum(each.numel() for each in run.network.parameters())
    source = run.config.get("init") or OmegaConf.select(run.config, "autoencoder.source")
    begins = f"from {source}" if source else "from scratch"
    if is_adapted(run.network):
        trained = sum(each.numel() for each in run.network.parameters() if each.requires_grad)
        rank = OmegaConf.select(run.config, "adapter.rank") or "?"
        kind = str(OmegaConf.select(run.config, "adapter.kind") or "lora")
        named = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}.get(kind, kind)
        return f"{named} of rank {rank}, {_count(trained)} of {_count(parameters)} parameters, {begins}"
    return f"{run.recipe.kind(run)}, {_count(parameters)} parameters, {begins}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}M" if parameters >= 1e6 else f"{parameters:,}"


def _device(run: Run) -> str:
    count, kind = processes.world_size(), hardware.accelerator(plain(run.config, "trainer.accelerator"))
    precision = hardware.precision(plain(run.config, "trainer.precision"), kind)
    processes_of_it = f"{count} process{'es' if count > 1 else ''}"
    several = f"{count} x {torch.cuda.get_device_name()}" if kind == "cuda" else f"CPU, {processes_of_it}"
    return f"{several}, {precision}" + (", compiled" if run.config.hardware.compile else "")


def _data(run: Run, plan: StagePlan, size: int | None) -> str:
    total = sum(plan.samples for plan in run.plans)
    stages = " + ".join(f"{plan.name} {plan.samples:,}" for plan in run.plans)
    to_see = f"{total:,} to see ({stages})" if len(run.plans) > 1 else f"{total:,} to see"
    source = with_stage(run.config, plan).data.get("train")
    where = shown_source(source) if isinstance(source, str) else source
    return f"{where}: " + (f"{size:,} samples, {to_see}" if size is not None else f"unknown size, {to_see}")


def _folder(run: Run, plan: StagePlan, start: StartPoint) -> str:
    if run.is_trial:
        return "a trial run, which keeps nothing"
    folder = shown(run.run_dir)
    if start.step or plan.number > 1:
        seen = start.step * plan.settings.batch_size
        begins = f"resumes {plan.name} after {seen:,} of its {plan.samples:,} samples"
    else:
        begins = "begins"
    return f"{folder}, {begins}; watch it: tensorboard --logdir {shlex.quote(folder)}"
