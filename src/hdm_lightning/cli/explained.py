"""`--explain KEY`: the meaning, type and value of a Hydra command's key, from comments and docstrings."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.cli.conf_comments import ROOT, ConfFile, conf_file, lineage
from hdm_lightning.cli.docstrings import Definition, Parameter, find, parameters, summary
from hdm_lightning.cli.overrides import CONF, EXPLAIN, composed, nearest_key
from hdm_lightning.errors import UserError

GROUPS = {
    "model": "the network",
    "text_encoder": "the frozen text encoder",
    "vae": "the frozen autoencoder",
    "data": "shards, crops and captions",
    "module": "loss, routing and the learning-rate rule",
    "optimizer": "the optimizer",
    "lr_scheduler": "the learning-rate schedule within a stage",
    "schedule": "the stages, in order",
    "stage": "settings of a schedule's stage",
    "trainer": "passed unchanged to `lightning.Trainer`",
    "hardware": "hardware settings outside Lightning: price, peak rate, compilation",
    "callbacks": "checkpoints, monitoring, sample images and more",
    "logger": "where metrics and images are logged",
    "adapter": "low-rank matrices trained beside the model's frozen weights",
    "experiment": "complete `hdm-train` runs",
    "vae_training": "complete `hdm-train-vae` runs",
    "experiment_vae": "more complete `hdm-train-vae` runs",
    "debug": "short runs for debugging",
    "hparams_search": "searches over settings",
}
"""Group of `conf/` to its purpose."""

SETTINGS = {
    "guard": "hdm_lightning.training.stages.Guard",
    "hardware": "hdm_lightning.training.stages.Hardware",
    "hub": "hdm_lightning.training.hub_upload.Hub",
    "schedule": "hdm_lightning.training.stages.Schedule",
    "validation": "hdm_lightning.training.stages.Validation",
}
OF_AUTOENCODERS = {
    "adversarial": "hdm_lightning.training.autoencoder_checks.Adversarial",
    "autoencoder": "hdm_lightning.training.autoencoder_checks.AutoencoderSource",
    "equivariance": "hdm_lightning.autoencoding.branches.BranchSettings",
    "loss": "hdm_lightning.training.autoencoder_checks.AutoencoderLoss",
    "patches": "hdm_lightning.training.autoencoder_checks.Patches",
    "stage": "hdm_lightning.training.stages.AutoencoderStageSettings",
    "validation": "hdm_lightning.training.autoencoder_checks.AutoencoderValidation",
}
"""The dataclass of each group of keys without a `_target_`."""

BUILDS = {"hdm_lightning.XUT.from_fields": "hdm_lightning.XUTConfig"}
"""Function that accepts arbitrary keys, to the class whose fields these are."""

_OF_HYDRA = {
    "_target_": "the class or function to call, with the other keys as arguments",
    "_partial_": "true: the `_target_` is called later, with further arguments",
}
_USAGE = """Show the meaning, type and value of a key:

  {command} {flag} KEY …         a key, or all keys below one
  {command} {flag} GROUP         the choices of a group
  {command} {flag} KEY experiment=NAME     the key with these overrides

"""


def explain(words: Sequence[str], config_name: str) -> str:
    """Return the output of `--explain` for keys, and overrides to compose with. Raises UserError: a key is unknown."""
    overrides = [word for word in words if "=" in word or word.startswith("~")]
    keys = [word.lstrip("+") for word in words if word not in overrides and not word.startswith("-")]
    reference = referenced(config_name, overrides)
    if not keys:
        return reference.overview()
    return "\n\n".join(reference.of(key) for key in keys)


def referenced(config_name: str, overrides: Sequence[str]) -> "Reference":
    """Compose a command's configuration with overrides."""
    config = composed(config_name, overrides, return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return Reference(config_name, config, choices)


@dataclass(frozen=True)
class Reference:
    """A composed configuration and the descriptions of its keys.

    Attributes:
        name: name of the command's configuration.
        config: composed configuration with unresolved interpolations.
        choices: group, or group@package, to the chosen option, in order of precedence.
    """

    name: str
    config: DictConfig
    choices: dict[str, Any]

    def overview(self) -> str:
        """Return the flag's usage and the top-level keys."""
        command = f"hdm-{self.name.replace('_', ' ' if self.name.startswith('plan') else '-')}"
        return _USAGE.format(command=command, flag=EXPLAIN) + "\n".join(self._below(""))

    def of(self, key: str) -> str:
        """Describe a key, with a line for each key below it; for a group, also list its choices.

        Raises:
            UserError: the key does not exist.
        """
        choices = list(self._choices(key))
        if not choices and not self.has(key) and self._taken(key)[0] is None:
            raise UserError("there is no such key", where=key, hint=self._hint(key))
        known = self.has(key) or not choices
        lines = [self._head(key), *self._facts(key)] if known else [f"{key}: {GROUPS.get(key, 'a group')}"]
        if choices:
            lines += ["  choices:", *(f"    {line}" for line in choices)]
        return "\n".join([*lines, *self._below(f"{key}.")])

    def has(self, key: str) -> bool:
        """Return whether a key exists, even without a value."""
        above, _, last = key.rpartition(".")
        node = OmegaConf.select(self.config, above, throw_on_resolution_failure=False) if above else self.config
        return isinstance(node, DictConfig) and last in node.keys()  # noqa: SIM118 ("in" ignores keys without a value)

    def meaning(self, key: str) -> str:
        """Return a key's meaning from the docstring of its parameter or the comment beside it; empty if neither."""
        parameter, taker = self._taken(key)
        documented = parameter.meaning if parameter else ""
        if parameter and taker and not parameter.members()[1]:
            documented = summary(taker)
        beside = next((file.comments[inside] for file, inside in self.places(key) if file.comments[inside]), "")
        own = parameter is not None and parameter.is_within(CONF.partition(".")[0])
        said = (documented or beside) if own else (beside or documented)
        said = GROUPS.get(key, "") or said or (summary(taker) if taker else "") or _OF_HYDRA.get(key.split(".")[-1], "")
        return as_typed(said)

    def places(self, key: str) -> Iterator[tuple[ConfFile, str]]:
        """Yield the files of `conf/` with a key, and its name in each, in order of precedence."""
        for choice, option in self.choices.items():
            group, _, package = choice.partition("@")
            path = ROOT / group / f"{option}.yaml"
            for file in lineage(path) if option and path.is_file() and not group.startswith("hydra") else ():
                inside = key if file.is_global else key.removeprefix(f"{package or group}.")
                if inside in file.comments and (file.is_global or inside != key):
                    yield file, inside
        own = [*lineage(ROOT / f"{self.name}.yaml"), *([conf_file(ROOT / "train.yaml")] if self.name == "plan" else ())]
        yield from ((file, key) for file in own if key in file.comments)

    def _hint(self, key: str) -> str:
        """Suggest an alternative to a missing key: another choice of its group that has it, or a similar key."""
        group, _, inside = key.partition(".")
        for path in sorted((ROOT / group).glob("*.yaml")) if group in self.choices and inside else ():
            if any(not file.is_global and inside in file.comments for file in lineage(path)):
                return f"it belongs to {group}={path.stem}: {EXPLAIN} {key} {group}={path.stem}"
        near = nearest_key(key, self.config)
        return f"did you mean {near}?" if near else f"`{EXPLAIN}` alone lists the top-level keys"

    def _head(self, key: str) -> str:
        value = self._raw(key)
        if key in self.choices:
            return f"{key}={self.choices[key]}" if self.choices[key] else f"{key} = null"
        if not self.has(key):
            return f"{key} (not set)"
        return key if isinstance(value, dict) else f"{key} = {_shown(value)}"

    def _facts(self, key: str) -> Iterator[str]:
        yield from textwrap.wrap(
            self.meaning(key) or "(not described)", 100, initial_indent="  ", subsequent_indent="  "
        )
        parameter, value = self._taken(key)[0], self._raw(key)
        kind = parameter.kind() if parameter else ""
        if kind and not isinstance(value, dict):
            default = (
                "" if self.has(key) or not parameter or not parameter.default else f"; {parameter.default} if not set"
            )
            yield f"  takes: {kind}{as_typed(default)}"
        if isinstance(value, str) and value.startswith("${") and not value.startswith("${hydra"):
            yield f"  follows: {value[2:-1].replace('stage.', self._stage_keys(), 1)}"
        places = list(self.places(key))
        if places:
            (file, inside), *_ = places
            yield f"  set in: conf/{file.path.relative_to(ROOT)}"
            comment = file.comments[inside]
            if comment and comment not in self.meaning(key):
                yield from textwrap.wrap(f"comment: {comment}", 100, initial_indent="  ", subsequent_indent="  ")

    def _stage_keys(self) -> str:
        return "stage." if "autoencoder" in self.config else "schedule.stages.NAME."

    def _below(self, above: str) -> Iterator[str]:
        """Yield a line for each key below one."""
        node = self._raw(above.removesuffix(".")) if above else OmegaConf.to_container(self.config, resolve=False)
        names = [str(name) for name in node] if isinstance(node, dict) else []
        heads = [self._head(f"{above}{name}") for name in names]
        width = min(44, max(map(len, heads), default=0))
        for name, head in zip(names, heads, strict=True):
            yield f"  {head:{width}}  {textwrap.shorten(self.meaning(f'{above}{name}'), 90, placeholder=' …')}".rstrip()

    def _raw(self, key: str) -> Any:
        above, _, last = key.rpartition(".")
        node = OmegaConf.select(self.config, above) if above else self.config
        plain: Any = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else {}
        return plain.get(last, plain.get(int(last)) if last.isdigit() else None)

    def _taken(self, key: str) -> tuple[Parameter | None, Definition | None]:
        """Return the parameter that takes a key's value, and the class or function built from the keys below it."""
        taker: Definition | None = None
        found: Parameter | None = None
        parts, of_user = key.split("."), False
        for number, part in enumerate(parts, start=1):
            if of_user:
                of_user, found = False, None
                continue
            found = parameters(taker).get(part) if taker else None
            taker, of_user = found.members() if found else (None, False)
            taker = self._made_at(".".join(parts[:number])) or taker
        return found, taker

    def _made_at(self, key: str) -> Definition | None:
        """Return the class or function built from the keys below a key."""
        value = self._raw(key)
        name = str(value["_target_"]) if isinstance(value, dict) and "_target_" in value else ""
        own = OF_AUTOENCODERS if "autoencoder" in self.config else {}
        name = name or {**SETTINGS, **own}.get(key, "")
        return find(BUILDS.get(name, name)) if name and not (key == "stage" and not own) else None

    def _choices(self, key: str) -> Iterator[str]:
        """Yield a line for each file of a group."""
        folder = ROOT / key
        for path in sorted(folder.glob("*.yaml")) if key in self.choices else ():
            yield f"{key}={path.stem:18} {textwrap.shorten(conf_file(path).head, 90, placeholder=' …')}".rstrip()


def _shown(value: Any) -> str:
    """Format a value as it would be typed."""
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def as_typed(text: str) -> str:
    """Return a docstring with None, True and False spelled as in YAML."""
    return re.sub(r"\b(None|True|False)\b", lambda word: {"None": "null"}.get(word[0], word[0].lower()), text)
