"""Writes the site's reference pages from the code: every configuration key, every public name; takes experiments in."""

import json
from pathlib import Path
from typing import Any

import mkdocs_gen_files
import yaml

import hdm_lightning
from hdm_lightning.cli.conf_comments import first_paragraph
from hdm_lightning.cli.docstrings import find, parameters
from hdm_lightning.cli.explained import BUILDS, GROUPS, OF_AUTOENCODERS, SETTINGS, as_typed

CONF = Path(__file__).parents[1] / "conf"


def targets(node: Any) -> list[str]:
    """Every `_target_` of a file."""
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [target for value in node.values() for target in targets(value)]
    return []


def table(name: str) -> str:
    """The keys that a class or function of this package takes, with their meaning from its docstring."""
    taker = find(BUILDS.get(name, name)) if name.startswith("hdm_lightning") else None
    rows = []
    for key, taken in (parameters(taker) if taker else {}).items():
        default, meaning = as_typed(taken.default), as_typed(taken.meaning).replace("|", "/")
        rows.append(f"| `{key}` | {taken.kind()} | {default and f'`{default}`'} | {meaning} |")
    return (
        "\n".join([f"`{name}`", "", "| key | takes | default | meaning |", "|---|---|---|---|", *rows, ""])
        if rows
        else ""
    )


def configuration() -> None:
    """Every group, its files as they stand, and the keys of what they make."""
    with mkdocs_gen_files.open("reference/configuration.md", "w") as page:
        print("# Configuration\n", file=page)
        print("Every configuration group with all its choices, generated from the files in `conf/`.", file=page)
        print(
            "`hdm-train --explain KEY` explains one key, and `--cfg job` shows the composed configuration.\n",
            file=page,
        )
        for command in ("train", "train_vae", "plan", "plan_autoencoder", "demo"):
            text = (CONF / f"{command}.yaml").read_text(encoding="utf-8")
            print(f"## hdm-{command.replace('_', ' ' if 'plan' in command else '-')}\n", file=page)
            print(f"{first_paragraph(text)}\n\n```yaml\n{text.rstrip()}\n```\n", file=page)
        for command, keys in (("hdm-train", ("guard", "validation", "hub")), ("hdm-train-vae", OF_AUTOENCODERS)):
            for key in keys:
                print(f"## {key} of {command}\n", file=page)
                print(table((OF_AUTOENCODERS if keys is OF_AUTOENCODERS else SETTINGS)[key]), file=page)
        for group, what in GROUPS.items():
            print(f"## {group}\n\n{what[0].upper()}{what[1:]}: `{group}=CHOICE`.\n", file=page)
            described: set[str] = set()
            print(table(SETTINGS.get(group, "")), file=page)
            for path in sorted((CONF / group).glob("*.yaml")):
                text = path.read_text(encoding="utf-8")
                print(f"### {group}={path.stem}\n\n{first_paragraph(text)}\n", file=page)
                print(f"```yaml\n{text.rstrip()}\n```\n", file=page)
                for target in dict.fromkeys(targets(yaml.safe_load(text))):
                    if target not in described:
                        described.add(target)
                        print(table(target), file=page)


def python() -> None:
    """The public names, by mkdocstrings."""
    with mkdocs_gen_files.open("reference/python.md", "w") as page:
        print("# Python\n", file=page)
        for name in hdm_lightning.__all__:
            if name.startswith("_"):
                continue
            made = getattr(hdm_lightning, name)
            options = f"heading_level: 2\n      heading: hdm_lightning.{name}\n      toc_label: {name}"
            print(f"::: {made.__module__}.{made.__qualname__}\n    options:\n      {options}\n", file=page)


def experiments() -> None:
    """The records of experiments with their pictures and numbers, which lie beside `docs/`."""
    for path in sorted((CONF.parent / "experiments").rglob("*")):
        if path.suffix in (".md", ".png", ".json", ".py"):
            with mkdocs_gen_files.open(path.relative_to(CONF.parent).as_posix(), "wb") as page:
                page.write(path.read_bytes())


def notebooks() -> None:
    """The notebooks as pages: their text, and their code in boxes to copy."""
    for path in sorted((CONF.parent / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        with mkdocs_gen_files.open(f"notebooks/{path.stem}.md", "w") as page:
            for number, cell in enumerate(cells):
                text = "".join(cell["source"])
                print(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```", end="\n\n", file=page)
                if number == 0:
                    print(
                        f"This page is `notebooks/{path.name}` of the repository, to be run cell by cell.\n", file=page
                    )


configuration()
python()
experiments()
notebooks()
