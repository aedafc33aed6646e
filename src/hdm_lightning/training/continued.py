"""What a run has left on disk and what it is to continue with: whether the two still belong together."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.encoders.pretrained import same_model
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from hdm_lightning.training import run_folder
from hdm_lightning.training.former_keys import present_spelling
from hdm_lightning.training.recorded import RESTORE, read_recorded, recorded_values
from hdm_lightning.training.rewind import newest_position
from hdm_lightning.training.shipped_settings import is_shipped
from hdm_lightning.training.stages import StagePlan

ENCODERS = ("text_encoder.name", "vae.name", "autoencoder.source")
WHITENED = "text_encoder.whiten_captions"
ADVERSARIAL = "adversarial.weight"
AVERAGES = "callbacks.weight_averages.halflife_samples"
OF_THE_MACHINE = (
    *("micro_batch_size", "activation_checkpointing", "validate_every", "save_every", "sample_every", "stop"),
    *("num_workers", "cache_dir", "cache_gb", "memory_cache_gb", "max_bad_share", "bad_patience", "validation"),
    *("latents", "quarantine", "_target_", "validation_samples", "validation_batch_size", "validation_seed"),
)
"""Keys of a stage and of the data that have no part in what is learned, or had none until now."""
OF_THE_TRAINING = ("callbacks", "logger", "trainer", "hardware", "guard", "validation")
"""Groups that bear on how a run is trained and watched, and on nothing that comes after."""
RECORDED_WITH_MODEL = "callbacks.sample_images"
"""How images are drawn is written into the model's folder, at each start."""
DEFAULTS = {"text_encoder.layer": -1, "text_encoder.whiten_captions": 0}
"""What a run had whose version did not know a key."""
ABSENT = "nothing"
"""The value, as it is told, of a key that a record does not have."""
OF_A_STAGE = re.compile(r"^schedule\.stages\.[^.]+\.")
MOVED = "; if the model has only moved, write its new place into "


def check_continued(config: DictConfig, plans: list[StagePlan], kept: Iterable[str], course: Iterable[str]) -> None:
    """What a run has left on disk can be resumed with these settings.

    Args:
        config: of now.
        plans: the stages.
        kept: keys and groups that a run keeps from its first start to its last.
        course: what the weights of a finished run come of; it cannot change any more.

    Raises:
        UserError: naming the key; or a `batch_size`, which a stage keeps.
    """
    run_dir = Path(config.run_dir)
    newest = [(plan, _newest_position(run_dir, plan)) for plan in plans]
    if not any(position for _, position in newest):
        return
    began, now = configuration_of(run_dir), OmegaConf.create(recorded_values(config))
    defaults = _defaults(plans)
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
    """Whether the run's folder holds a checkpoint of any of the stages.

    Raises:
        UserError: there can be no such folder.
    """
    return any(_newest_position(Path(config.run_dir), plan) for plan in plans)


def _newest_position(run_dir: Path, plan: StagePlan) -> dict[str, Any] | None:
    try:
        return newest_position(run_folder.checkpoint_folder(run_dir, plan))
    except OSError as error:
        what = f"the run's folder cannot be looked into ({error.strerror})"
        raise UserError(what, where="run_dir", hint="give a shorter name=, or another run_dir=") from error


def configuration_of(run_dir: Path) -> DictConfig | None:
    """The configuration that the run last started with, in the present spelling, or None where it has not started.

    Raises:
        UserError: it cannot be read.
    """
    file = run_dir / run_folder.CONFIG
    return present_spelling(read_recorded(file)) if file.exists() else None


def _check_kept(
    run_dir: Path, began: DictConfig, now: DictConfig, kept: Iterable[str], defaults: dict[str, Any]
) -> None:
    if began.get("model") is None and now.get("model") is not None:
        what = "says nothing of the model, so it is not this run's"
        raise UserError(what, where=str(run_dir / run_folder.CONFIG), hint=RESTORE)
    for key in kept:
        values = (key, _value(began, key), _value(now, key))
        for name, before, present in _leaves(*values) if key == "model" else [values]:
            unknown = name.endswith("._target_") and before in (None, ABSENT)  # to the version that it began with
            brought = before is ABSENT and _is_default(name, present, defaults)  # by a later version
            if unknown or brought or _may_be(name, before, present):
                continue
            moved = f"{MOVED}{run_dir / run_folder.CONFIG}" if name in ENCODERS else ""
            hint = f"restore it, or choose another name=; {_another(now, run_dir)}"
            raise_changed(run_dir, name, before, present, hint + moved)


def _another(now: DictConfig, run_dir: Path) -> str:
    if "schedule" in now:
        return "init= starts a new run from a model's weights"
    return f"{run_folder.way_on(now, run_dir)} starts a new run from a trained autoencoder"


def _may_be(key: str, before: Any, now: Any) -> bool:
    """Whether a run that began with one value of a key can continue with the other."""
    if key in (WHITENED, ADVERSARIAL):  # measured once, on however many captions; another weight is the same networks
        return bool(before) == bool(now)
    if key == AVERAGES:  # one of another half-life starts from the nearest
        return bool(before) or not now
    if key in ENCODERS and all(each and isinstance(each, str) for each in (before, now)):
        return same_model(before, now)
    return bool(before == now)


def raise_changed(run_dir: Path, key: str, before: Any, now: Any, hint: str) -> NoReturn:
    """Raise the `UserError` of a value that a run keeps and that is another now."""
    raise UserError(f"the run in {run_dir} began with {before}, not {now}", where=key, hint=hint)


def _check_finished(
    run_dir: Path, began: DictConfig, now: DictConfig, course: Iterable[str], defaults: dict[str, Any]
) -> None:
    """Nothing is asked of a finished run that would change its weights: it would be done without effect."""
    for key, before, present in _differences(course, began, now, defaults):
        raise UserError(
            f"the training in {run_dir} is over and had {before}; {present} would change nothing",
            where=key,
            hint=f"restore it, or start another run by another name=: {run_folder.way_on(now, run_dir)}",
        )


def _differences(
    groups: Iterable[str], began: DictConfig, now: DictConfig, defaults: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Each key of some groups that has to do with what is learned and has another value now: before, and now."""
    for group in groups:
        began_with, asked = _value(began, group, ABSENT), _value(now, group)
        if began_with is ABSENT and asked is None:  # as weight averages with callbacks=none
            continue
        for key, before, present in _leaves(group, began_with, asked):
            brought = before is ABSENT and _is_default(key, present, defaults)  # by a later version
            if before != present and not brought and not set(key.split(".")) & set(OF_THE_MACHINE):
                yield key, before, present


def asked_too_late(config: DictConfig, plans: list[StagePlan]) -> list[str]:
    """What is asked of stages that are over while others are still to come, in words; it has no effect any more."""
    run_dir = Path(config.run_dir)
    over = [plan for plan in plans if run_folder.stage_is_done(run_dir, plan)]
    began = configuration_of(run_dir)
    if began is None or len(over) in (0, len(plans)):
        return []
    now, stages = OmegaConf.create(recorded_values(config)), [plan.written_at for plan in over]
    return [
        f"{key} was {before} while its stage was trained, which is over: {present} changes nothing"
        for key, before, present in _differences(stages, began, now, _defaults(plans))
    ]


def without_effect(config: DictConfig, plans: list[StagePlan]) -> list[str]:
    """Keys and parts of a run whose training is over that are other ones than it was trained with, by name."""
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
    """A recorded value as it is where the run's folder was moved, or has another name, since."""
    if isinstance(value, dict):
        return {key: _moved(each, began, now) for key, each in value.items()}
    if not isinstance(value, str):
        return value
    if value == began.get("name"):
        return now.get("name")
    return value.replace(str(began.get("run_dir") or now.run_dir), str(now.run_dir))


def _defaults(plans: list[StagePlan]) -> dict[str, Any]:
    """What a stage and the network have of each key that they do not name."""
    found = {}
    for group, kind in (("stage", type(plans[0].settings)), ("model", XUTConfig)):
        for each in fields(kind):
            value = each.default_factory() if each.default_factory is not MISSING else each.default
            found[f"{group}.{each.name}"] = list(value) if isinstance(value, tuple) else value
    return found


def _is_default(key: str, value: Any, defaults: dict[str, Any]) -> bool:
    """Whether a key has the value that it has for who does not name it: then a later version may have brought it."""
    key = OF_A_STAGE.sub("stage.", key)
    return (key in defaults and defaults[key] == value) or is_shipped(key, value)


def _leaves(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The single values of a group, key by key; of groups that have lost keys, what they have.

    Of a key that is not in the record, the value before is `ABSENT`.
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
