"""A trained model's README.md, its card on the hub; values from records are escaped to show as plain text."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hdm_lightning.json_files import require_shallow
from hdm_lightning.printable import in_one_line
from hdm_lightning.regular_files import open_regular

CARD, SAMPLES = "README.md", "samples.png"
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
"""A license identifier as on the hub, such as apache-2.0 or cc-by-nc-sa-4.0."""
OTHER = "other: "
"""Prefix of the name of a license that the hub has no identifier for, and would refuse as one."""
_TEMPLATE = Path(__file__).with_name("model_card.md")
_AVERAGED = 'the weights averaged over training; `….raw.safetensors` (`variant="raw"`): the last ones'
_BY_NAME = "The text encoder is not included; it is loaded by the name above."
_INSIDE = "The text encoder is included, in `text_encoder/` and `tokenizer/`."
_UNKNOWN_BASE = " The license of the model that it started from is unknown: ask that model's owner, too."
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LONGEST_FRONT = 1 << 16
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")
_APART = ("data", "data_samples", "captions", "prompts", "measures", "license", "name", "base")
"""Keys of the training record that the card shows as text instead of JSON."""


def model_card(
    xut: Mapping[str, Any],
    text_encoder: Mapping[str, Any] | None,
    training: Mapping[str, Any],
    *,
    keeps_raw: bool = False,
    inside: bool = False,
    sampled: bool = False,
) -> str:
    """Return the Markdown of a trained model's README.md: what it is, what it needs, how to use it, how good it is.

    Args:
        xut: the network's configuration.
        text_encoder: `name`, `layer` and `context_length`, if known.
        training: record of the training; its `name`, `resolution`, `license`, `base` (`name`, `license` and `hub`:
            whether the name is a hub name), `data`, `captions`, `prompts`, `stages` and `measures` are shown as text.
        keeps_raw: whether the last weights are stored next to the averaged ones.
        inside: whether the text encoder is in the folder.
        sampled: whether `SAMPLES` is in the folder.
    """
    text = "not recorded"
    if text_encoder:
        shown = {
            **text_encoder,
            "name": plain_text(Path(str(text_encoder["name"])).name if inside else text_encoder["name"]),
        }
        text = "{name}, hidden state {layer}, up to {context_length} tokens".format(**shown)
    base = _mapping(training.get("base"))
    return _TEMPLATE.read_text(encoding="utf-8").format(
        front=_front(training, base),
        name=plain_text(training.get("name", "A trained XUT")),
        size=training.get("resolution", 512),
        **{key: xut[key] for key in ("width", "depth", "patch_size", "residual", "skips", "channels")},
        text_encoder=text,
        inclusion=_INSIDE if inside else _BY_NAME,
        folder="final/",
        weights=_AVERAGED if keeps_raw else "the weights",
        samples=_samples(training) if sampled else "",
        measures=_measures(training),
        data=_data(training),
        license=_license(training, base),
        began=f"Training started from the weights of {plain_text(base['name'])}.\n" if base.get("name") else "",
        training=in_fence({key: value for key, value in training.items() if key not in _APART}),
    )


def card_license(card: Path) -> str | None:
    """Return the license in a card's front matter; a `license_name` gets the prefix `OTHER`.

    None if there is none or the card cannot be read.
    """
    try:
        with open(card, encoding="utf-8-sig", opener=open_regular) as file:
            front = _FRONT.match(file.read(_LONGEST_FRONT))
        if front:
            require_shallow(front[1])
        said: Any = yaml.safe_load(front[1]) if front else {}
        name = said.get("license_name")
        told = name or said.get("license")
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        return None
    return in_one_line(f"{OTHER if name else ''}{told}") if isinstance(told, str) else None


def recorded_license(training: Mapping[str, Any]) -> str | None:
    """Return the license in a training record: the model's own, else that of its base."""
    told = training.get("license") or _mapping(training.get("base")).get("license")
    return in_one_line(told) if isinstance(told, str) else None


def _front(training: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Return the lines of the front matter: the license, by default the base's, and the base."""
    license, name = recorded_license(training), base.get("name")
    lines = [f"license: {license}\n"] if _is_license(license) else []
    if isinstance(license, str) and _is_license(other := license.removeprefix(OTHER)) and other != license:
        lines = [f"license: other\nlicense_name: {other}\n"]
    if base.get("hub") and isinstance(name, str) and _HUB_NAME.fullmatch(name):
        lines.append(f"base_model: {name}\n")
    return "".join(lines)


def _license(training: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    own, given = (str(each.get("license") or "").removeprefix(OTHER) for each in (training, base))
    if own and _is_license(own):
        other = f" The model that it started from is under {plain_text(given)}." if given and given != own else ""
        return f"{own}.{other if given else _UNKNOWN_BASE if base else ''}"
    if given and not own:
        return f"{plain_text(given)}, like the model that it started from."
    return f"Not stated. Ask its owner before you use the model or its images.{_UNKNOWN_BASE if base else ''}"


def _is_license(given: Any) -> bool:
    return isinstance(given, str) and LICENSE.fullmatch(given) is not None


def plain_text(value: Any) -> str:
    """Return a value as one line that Markdown and HTML show literally."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def in_fence(value: Any) -> str:
    """Return JSON that cannot close the code fence around it."""
    return json.dumps(value, indent=2, ensure_ascii=False).replace("`", "\\u0060")


def _samples(training: Mapping[str, Any]) -> str:
    prompts = [f"- {plain_text(prompt)}" for prompt in _list(training.get("prompts"))]
    return "\n".join(["## Samples", "", f"From the end of training: ![samples]({SAMPLES})", "", *prompts, "", ""])


def _measures(training: Mapping[str, Any]) -> str:
    """Return a table of the last validation and of evaluation results; empty if there are neither."""
    stages = _list(training.get("stages"))
    last = stages[-1].get("validation") if stages and isinstance(stages[-1], Mapping) else None
    rows = [f"| validation loss, {plain_text(key)} | {_number(value)} | |" for key, value in _mapping(last).items()]
    for key, value in _mapping(training.get("measures")).items():
        found = _mapping(value)
        interval = f"{_number(found.get('low'))} to {_number(found.get('high'))}" if "low" in found else ""
        rows.append(f"| {plain_text(key)} | {_number(found.get('value'))} | {interval} |")
    return (
        "\n".join(["## Measures", "", "| measure | value | interval |", "|---|---|---|", *rows, "", ""]) if rows else ""
    )


def _data(training: Mapping[str, Any]) -> str:
    rows = []
    for each in map(_mapping, _list(training.get("data"))):
        weight = each.get("weight")
        rows.append(f"- {plain_text(each.get('source'))}" + ("" if weight is None else f", weight {_number(weight)}"))
    if isinstance(count := training.get("data_samples"), int):
        rows.append(f"- {count:,} samples in all")
    captions = _mapping(training.get("captions"))
    if captions:
        rows.append(
            "- captions: " + ", ".join(f"{plain_text(key)} {plain_text(each)}" for key, each in captions.items())
        )
    return "\n".join(rows or ["Not recorded."])


def _number(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.4g}" if number else plain_text(value)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
