"""Check that the settings of a resumed run match what the run left on disk."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.encoders.pretrained import same_model
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from hdm_lightning.training import run_folder
from hdm_lightning.training.composition import plain
from hdm_lightning.training.former_keys import present_spelling
from hdm_lightning.training.recorded import RESTORE, read_recorded, recorded_values
from hdm_lightning.training.rewind import newest_position
from hdm_lightning.training.stages import StagePlan

KEPT: tuple[str, ...] = (
    *("model", "adapter", "optimizer._target_", "text_encoder.layer", "vae.mean", "vae.std", "text_encoder.name"),
    *("vae.name", "text_encoder.whiten_captions"),
)
"""Keys and groups that must stay the same from a network's first start to its last."""
COURSE: tuple[str, ...] = (
    *("seed", "init", "optimizer", "lr_scheduler", "module", "data", "schedule.stages", "schedule.carry_moments"),
    "callbacks.weight_averages",
)
"""Keys and groups that determine the weights of a finished network and can no longer change."""
KEPT_VAE = (
    *("autoencoder.config", "autoencoder.source", "autoencoder.train_encoder", "stage.batch_size"),
    *("adversarial.weight", "callbacks.weight_averages.halflife_samples"),
)
JUDGED = ("adversarial.channels", "adversarial.layers", "adversarial.norm")
"""As `KEPT`, for an autoencoder and for one that is trained with a discriminator."""
COURSE_VAE = (
    *("seed", "stage", "loss", "equivariance", "patches", "adversarial", "data", "optimizer", "lr_scheduler", "module"),
    "callbacks.weight_averages",
)
"""As `COURSE`, for the weights or the model card of an autoencoder."""
ENCODERS = ("text_encoder.name", "vae.name", "autoencoder.source")
WHITENED = "text_encoder.whiten_captions"
ADVERSARIAL = "adversarial.weight"
AVERAGES = "callbacks.weight_averages.halflife_samples"
OF_THE_MACHINE = (
    *("micro_batch_size", "activation_checkpointing", "validate_every", "save_every", "sample_every", "stop"),
    *("num_workers", "cache_dir", "cache_gb", "memory_cache_gb", "max_bad_share", "bad_patience", "validation"),
    *("latents", "quarantine", "_target_", "validation_samples", "validation_batch_size", "validation_seed"),
)
"""Keys of a stage and of the data that do not affect what is learned, or have not until now."""
OF_THE_TRAINING = ("callbacks", "logger", "trainer", "hardware", "guard", "validation")
"""Groups that affect how a run is trained and monitored, and nothing after the training."""
RECORDED_WITH_MODEL = "callbacks.sample_images"
"""The sampling settings, which every start writes into the model's folder."""
DEFAULTS = {"text_encoder.layer": -1, "text_encoder.whiten_captions": 0}
"""Values used by runs of versions that did not have the key."""
ABSENT = "nothing"
"""The value reported for a key that is not in a record."""
OF_A_STAGE = re.compile(r"^schedule\.stages\.[^.]+\.")
MOVED = "; if the model has only moved, write its new location into "
CONF = Path(str(import_module("hdm_lightning.conf").__file__)).parent


def check_continued(config: DictConfig, plans: list[StagePlan]) -> None:
    """Check that a run can be resumed with these settings.

    Raises:
        UserError: naming the key, or a stage's `batch_size`, which must not change.
    """
    run_dir = Path(config.run_dir)
    newest = [(plan, _newest_position(run_dir, plan)) for plan in plans]
    if not any(position for _, position in newest):
        return
    began, now = configuration_of(run_dir), OmegaConf.create(recorded_values(config))
    kept, course, defaults = KEPT, COURSE, _defaults(plans)
    if "schedule" not in config:
        kept, course = (*KEPT_VAE, *(JUDGED if plain(config, "adversarial.weight") else ())), COURSE_VAE
    if began is not None:
        _check_kept(run_dir, began, now, kept, defaults)
    for plan, position in newest:
        if position is None or run_folder.stage_is_done(run_dir, plan):
            continue
        before = position.get("batch_size") or plan.settings.batch_size
        if before != plan.settings.batch_size:
            raise UserError(
                f"the stage began with batch_size {before}, not {plan.settings.batch_size}: its steps would mean other "
                "samples",
                where=f"{plan.written_at}.batch_size",
                hint=f"set it to {before}; micro_batch_size may change at any time",
            )
    if began is not None and all(run_folder.stage_is_done(run_dir, plan) for plan in plans):
        _check_finished(run_dir, began, now, course, defaults)


def has_begun(config: DictConfig, plans: list[StagePlan]) -> bool:
    """Return whether the run's folder contains a checkpoint of any stage.

    Raises:
        UserError: the folder cannot be read.
    """
    return any(_newest_position(Path(config.run_dir), plan) for plan in plans)


def _newest_position(run_dir: Path, plan: StagePlan) -> dict[str, Any] | None:
    try:
        return newest_position(run_folder.checkpoint_folder(run_dir, plan))
    except OSError as error:
        what = f"the run's folder cannot be read ({error.strerror})"
        raise UserError(what, where="run_dir", hint="use a shorter name=, or another run_dir=") from error


def configuration_of(run_dir: Path) -> DictConfig | None:
    """Return the configuration of the run's last start under the current keys, or None if it has not started.

    Raises:
        UserError: it cannot be read.
    """
    file = run_dir / run_folder.CONFIG
    return present_spelling(read_recorded(file)) if file.exists() else None


def _check_kept(
    run_dir: Path, began: DictConfig, now: DictConfig, kept: Iterable[str], defaults: dict[str, Any]
) -> None:
    if began.get("model") is None and now.get("model") is not None:
        what = "has no model, so it is not this run's"
        raise UserError(what, where=str(run_dir / run_folder.CONFIG), hint=RESTORE)
    for key in kept:
        values = (key, _value(began, key), _value(now, key))
        for name, before, present in _leaves(*values) if key == "model" else [values]:
            unknown = name.endswith("._target_") and before in (None, ABSENT)  # to the version that it began with
            brought = before is ABSENT and _is_default(name, present, defaults)  # by a later version
            if unknown or brought or _may_be(name, before, present):
                continue
            moved = f"{MOVED}{run_dir / run_folder.CONFIG}" if name in ENCODERS else ""
            hint = f"restore it, or choose another name=; {_another(now, run_dir)}{moved}"
            raise UserError(f"the run in {run_dir} began with {before}, not {present}", where=name, hint=hint)


def _another(now: DictConfig, run_dir: Path) -> str:
    if "schedule" in now:
        return "init= starts a new run from a model's weights"
    return f"{run_folder.way_on(now, run_dir)} starts a new run from a trained autoencoder"


def _may_be(key: str, before: Any, now: Any) -> bool:
    """Return whether a run that began with one value of a key can continue with another."""
    if key in (WHITENED, ADVERSARIAL):  # measured once, on any number of captions; any weight has the same networks
        return bool(before) == bool(now)
    if key == AVERAGES:  # a new half-life starts from the nearest average
        return bool(before) or not now
    if key in ENCODERS and all(each and isinstance(each, str) for each in (before, now)):
        return same_model(before, now)
    return bool(before == now)


def _check_finished(
    run_dir: Path, began: DictConfig, now: DictConfig, course: Iterable[str], defaults: dict[str, Any]
) -> None:
    """Refuse changes to a finished run that would affect its weights, as they can no longer take effect."""
    for key, before, present in _differences(course, began, now, defaults):
        raise UserError(
            f"the training in {run_dir} is over and used {before}; {present} would change nothing",
            where=key,
            hint=f"restore it, or start another run under a new name=: {run_folder.way_on(now, run_dir)}",
        )


def _differences(
    groups: Iterable[str], began: DictConfig, now: DictConfig, defaults: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key of the groups that affects learning and has changed, with its old and its new value."""
    for group in groups:
        began_with, asked = _value(began, group, ABSENT), _value(now, group)
        if began_with is ABSENT and asked is None:  # such as weight averages with callbacks=none
            continue
        for key, before, present in _leaves(group, began_with, asked):
            brought = before is ABSENT and _is_default(key, present, defaults)  # by a later version
            if before != present and not brought and not set(key.split(".")) & set(OF_THE_MACHINE):
                yield key, before, present


def asked_too_late(config: DictConfig, plans: list[StagePlan]) -> list[str]:
    """Return a warning for each change to a stage that is over while others are still to come."""
    run_dir = Path(config.run_dir)
    over = [plan for plan in plans if run_folder.stage_is_done(run_dir, plan)]
    began = configuration_of(run_dir)
    if began is None or len(over) in (0, len(plans)):
        return []
    now, stages = OmegaConf.create(recorded_values(config)), [plan.written_at for plan in over]
    return [
        f"{key} was {before} when its stage was trained; the stage is over, so {present} changes nothing"
        for key, before, present in _differences(stages, began, now, _defaults(plans))
    ]


def without_effect(config: DictConfig, plans: list[StagePlan]) -> list[str]:
    """Return the keys of a finished run that differ from those it was trained with and no longer have an effect."""
    began = configuration_of(Path(config.run_dir))
    if began is None:
        return []
    now, defaults, found = OmegaConf.create(recorded_values(config)), _defaults(plans), []
    for group in OF_THE_TRAINING:
        was, asked = (value if isinstance(value := _value(each, group), dict) else {} for each in (began, now))
        for name in sorted({*was, *asked}, key=str):
            key, before, present = f"{group}.{name}", _moved(was.get(name), began, now), asked.get(name)
            if isinstance(before, dict) and isinstance(present, dict):
                other = key != RECORDED_WITH_MODEL and any(
                    one != two and not (one is ABSENT and _is_default(leaf, two, defaults))
                    for leaf, one, two in _leaves(key, before, present)
                )
            else:
                other = before != present and not (before is None and _is_default(key, present, defaults))
            found += [key] if other else []
    return found


def _moved(value: Any, began: DictConfig, now: DictConfig) -> Any:
    """Return a recorded value as it would be if the run's folder had always had its present name and place."""
    if isinstance(value, dict):
        return {key: _moved(each, began, now) for key, each in value.items()}
    if not isinstance(value, str):
        return value
    if value == began.get("name"):
        return now.get("name")
    return value.replace(str(began.get("run_dir") or now.run_dir), str(now.run_dir))


def _defaults(plans: list[StagePlan]) -> dict[str, Any]:
    """Return the default of each key of a stage and of the network."""
    found = {}
    for group, kind in (("stage", type(plans[0].settings)), ("model", XUTConfig)):
        for each in fields(kind):
            value = each.default_factory() if each.default_factory is not MISSING else each.default
            found[f"{group}.{each.name}"] = list(value) if isinstance(value, tuple) else value
    return found


def _is_default(key: str, value: Any, defaults: dict[str, Any]) -> bool:
    """Return whether a key has its default value, so a later version may have introduced it."""
    key = OF_A_STAGE.sub("stage.", key)
    return (key in defaults and defaults[key] == value) or _is_shipped(key, value)


def _is_shipped(key: str, value: Any) -> bool:
    """Return whether a value may come from this package's configuration files rather than from the user.

    A value there that refers to other keys may stand for any; one that refers to a stage is never recorded.
    """
    return any(
        each == value or (isinstance(each, str) and "${" in each and "${stage." not in each)
        for each in _shipped().get(key, ())
    )


@cache
def _shipped() -> dict[str, list[Any]]:
    """Return the values of each key in all files, with interpolations as written; keys of a stage are below `stage`."""
    found: dict[str, list[Any]] = defaultdict(list)
    for file in CONF.rglob("*.yaml"):
        is_global = file.read_text(encoding="utf-8").startswith("# @package _global_")
        values: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for group in reversed(() if is_global else file.parent.relative_to(CONF).parts):
            values = {group: values}
        for key in values:
            for leaf, _, value in _leaves(key, ABSENT, values[key]):
                found[leaf].append(value)
    return dict(found)


def _leaves(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the single values of a group, key by key; for groups that have lost keys, the lists of their keys.

    The old value of a key that is not in the record is `ABSENT`.
    """
    if before is ABSENT and isinstance(now, dict) and now:
        for name in now:
            yield from _leaves(f"{key}.{name}", ABSENT, now[name])
    elif not (isinstance(before, dict) and isinstance(now, dict)):
        yield key, before, now
    elif set(before) - set(now) - {"_target_"}:
        yield key, sorted(before), sorted(now)
    else:
        for name in now:
            yield from _leaves(f"{key}.{name}", before.get(name, ABSENT), now[name])


def _value(config: DictConfig, key: str, absent: Any = None) -> Any:
    value = OmegaConf.select(config, key, default=DEFAULTS.get(key, absent))
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
