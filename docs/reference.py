"""Writes the site's reference pages from the code: every configuration key, every public name; takes experiments in."""

import inspect
import re
from pathlib import Path
from typing import Any

import mkdocs_gen_files
import yaml
from hydra.utils import get_object

import hdm_lightning

CONF = Path(__file__).parents[1] / "conf"
GROUPS = {
    "model": "the network",
    "text_encoder": "the frozen text encoder",
    "vae": "the frozen autoencoder",
    "data": "shards, crops and captions",
    "module": "loss, routing and the rule of learning rates",
    "optimizer": "the optimizer",
    "lr_scheduler": "the learning rate over a stage",
    "schedule": "stages, in their order",
    "stage": "what a schedule's stages are made of",
    "trainer": "handed to `lightning.Trainer` whole",
    "hardware": "what is not Lightning's: price, peak rate, compilation",
    "callbacks": "what a run keeps, watches and draws",
    "logger": "where numbers and images go",
    "experiment": "whole runs of `hdm-train`",
    "vae_training": "whole trainings of `hdm-train-vae`",
    "experiment_vae": "more of them",
    "debug": "short runs that find mistakes",
    "hparams_search": "searches over settings",
}


def first_comment(text: str) -> str:
    """The first paragraph of the comment that a file begins with; the file itself follows whole."""
    lines = []
    for line in text.removeprefix("# @package _global_\n").splitlines():
        if not line.startswith("# ") or line.startswith("#   "):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def targets(node: Any) -> list[str]:
    """Every `_target_` of a file."""
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [target for value in node.values() for target in targets(value)]
    return []


def arguments(target: str) -> str:
    """A table of the keys that a `_target_` of this package takes, with their meaning from its docstring."""
    if not target.startswith("hdm_lightning"):
        return ""
    made = get_object(target)
    text = inspect.getdoc(made) or ""
    block = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", text, re.MULTILINE)
    meanings: dict[str, str] = {}
    for entry in re.split(r"\n(?=[ ]{4}\S)", "\n" + block[1]) if block else ():
        names, _, meaning = entry.strip().partition(":")
        meanings |= {name.strip(): " ".join(meaning.split()) for name in names.split(",")}
    rows = []
    for name, parameter in inspect.signature(made).parameters.items():
        if name in ("self", "kwargs", "changes", "fields") or name.startswith("_"):
            continue
        default = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        rows.append(f"| `{name}` | {default} | {meanings.get(name, '').replace('|', '/')} |")
    return "\n".join(["", "| key | default | meaning |", "|---|---|---|", *rows, ""]) if rows else ""


def configuration() -> None:
    """Every group, its files as they stand, and the keys of what they make."""
    with mkdocs_gen_files.open("reference/configuration.md", "w") as page:
        print("# Configuration\n", file=page)
        print("Every group and every choice, as the files of `conf/` have them.", file=page)
        print("`--cfg job` shows what a command line composes to.\n", file=page)
        for command in ("train", "train_vae", "plan", "plan_autoencoder", "demo"):
            text = (CONF / f"{command}.yaml").read_text(encoding="utf-8")
            print(f"## hdm-{command.replace('_', ' ' if 'plan' in command else '-')}\n", file=page)
            print(f"{first_comment(text)}\n\n```yaml\n{text.rstrip()}\n```\n", file=page)
        for group, what in GROUPS.items():
            print(f"## {group}\n\n{what[0].upper()}{what[1:]}: `{group}=CHOICE`.\n", file=page)
            described: set[str] = set()
            for path in sorted((CONF / group).glob("*.yaml")):
                text = path.read_text(encoding="utf-8")
                print(f"### {group}={path.stem}\n\n{first_comment(text)}\n", file=page)
                print(f"```yaml\n{text.rstrip()}\n```\n", file=page)
                for target in dict.fromkeys(targets(yaml.safe_load(text))):
                    if target not in described:
                        described.add(target)
                        table = arguments(target)
                        if table:
                            print(f"`{target}`\n{table}", file=page)


def python() -> None:
    """The public names, by mkdocstrings."""
    with mkdocs_gen_files.open("reference/python.md", "w") as page:
        print("# Python\n", file=page)
        for name in hdm_lightning.__all__:
            if name.startswith("_"):
                continue
            made = getattr(hdm_lightning, name)
            print(f"::: {made.__module__}.{made.__qualname__}\n    options:\n      heading_level: 2\n", file=page)


def experiments() -> None:
    """The records of experiments with their pictures and numbers, which lie beside `docs/`."""
    for path in sorted((CONF.parent / "experiments").rglob("*")):
        if path.suffix in (".md", ".png", ".json"):
            with mkdocs_gen_files.open(path.relative_to(CONF.parent).as_posix(), "wb") as page:
                page.write(path.read_bytes())


configuration()
python()
experiments()
