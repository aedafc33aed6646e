"""What a run has left on disk and what it is to go on with: whether the one still belongs to the other."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from hdm_lightning.encoders.sources import same_model
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from hdm_lightning.training import run_folder
from hdm_lightning.training.checks import model_config_from
from hdm_lightning.training.recorded import read_recorded
from hdm_lightning.training.recovery.rewinds import newest_position
from hdm_lightning.training.settings import TrainSettings
from hdm_lightning.training.stages import StagePlan

KEPT = ("optimizer.name", "text_encoder.layer", "vae.mean", "vae.std")
ENCODERS = ("text_encoder.name", "vae.name")
WHITENED = "text_encoder.whiten_captions"
OF_THE_COURSE = ("seed", "init", "optimizer", "data", "schedule.stages")
"""What the weights of a finished run come of."""
OF_THE_MACHINE = (
    *("micro_batch_size", "activation_checkpointing", "validate_every", "save_every", "sample_every", "stop"),
    *("workers", "cache_dir", "cache_gb", "memory_cache_gb", "max_bad_share", "bad_patience", "validation"),
)
"""Keys of a stage and of the data that have no part in what is learned, or had none until now."""
HINT = "restore it, or choose another name=; init= starts a new run from a model's weights"
MOVED = "; if the model has only moved, write its new place into "


def check_continued(settings: TrainSettings, model: XUTConfig, plans: list[StagePlan]) -> None:
    """What a run has left on disk can be gone on from with these settings.

    Raises:
        UserError: naming what a run keeps, the network and all that gives its inputs and targets their meaning, or a
            `batch_size`, which a stage keeps, or what would change nothing since all stages are done.
    """
    run_dir = Path(settings.run_dir)
    newest = [(plan, newest_position(run_folder.checkpoint_folder(run_dir, plan))) for plan in plans]
    if not any(position for _, position in newest):
        return
    _check_kept(run_dir, settings, model)
    for plan, position in newest:
        if position is None or run_folder.stage_is_done(run_dir, plan):
            continue
        then, now = position["batch_size"], plan.settings.batch_size
        if then != now:
            raise UserError(
                f"the stage began with batch_size {then}, not {now}: its steps would mean other samples",
                where=f"schedule.stages.{plan.name}.batch_size",
                hint=f"set it to {then}; micro_batch_size may change at any time",
            )
    if all(run_folder.stage_is_done(run_dir, plan) for plan in plans):
        hint = f"restore it, or start another run by another name=, from these weights with init={run_dir}"
        check_finished(run_dir, settings, OF_THE_COURSE, OF_THE_MACHINE, hint)


def check_finished(run_dir: Path, settings: Any, course: Iterable[str], free: Iterable[str], hint: str) -> None:
    """Nothing is asked of a finished run that would change its weights: it would be done without effect.

    Args:
        run_dir: the run's folder.
        settings: what it is called with.
        course: keys of settings and of groups of them that the weights come of.
        free: keys and groups in them that may differ all the same.
        hint: what to do about a difference.

    Raises:
        UserError: naming the first key that differs.
    """
    began = configuration_of(run_dir)
    groups = () if began is None else values_of(began, settings, course)
    leaves = (leaf for group in groups for leaf in _leaves(*group))
    for key, then, now in leaves:
        if then != now and not set(key.split(".")) & set(free):
            what = f"the training in {run_dir} is over and had {then}; {now} would change nothing"
            raise UserError(what, where=key, hint=hint)


def _leaves(key: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The single values of a group, key by key; of groups that have lost keys, what they have.

    A key that a later version has brought is not in the record and does not count.
    """
    if not (isinstance(then, dict) and isinstance(now, dict)):
        yield key, then, now
    elif set(then) - set(now):
        yield key, sorted(then), sorted(now)
    else:
        for name in then:
            yield from _leaves(f"{key}.{name}", then[name], now[name])


def _check_kept(run_dir: Path, settings: TrainSettings, model: XUTConfig) -> None:
    began = configuration_of(run_dir)
    for key, then, now in () if began is None else _changed(began, settings, model):
        raise_changed(run_dir, key, then, now, HINT, may_have_moved=key in ENCODERS)


def configuration_of(run_dir: Path) -> DictConfig | None:
    """The configuration that the run last started with, or None where it has not started.

    Raises:
        UserError: it cannot be read.
    """
    config = run_dir / run_folder.CONFIG
    if not config.exists():
        return None
    return OmegaConf.create(read_recorded(config))


def raise_changed(run_dir: Path, key: str, then: Any, now: Any, hint: str, *, may_have_moved: bool = False) -> NoReturn:
    """Raise the `UserError` of a value that a run keeps and that is another now."""
    moved = f"{MOVED}{run_dir / run_folder.CONFIG}" if may_have_moved else ""
    raise UserError(f"the run in {run_dir} began with {then}, not {now}", where=key, hint=hint + moved)


def _changed(began: DictConfig, settings: TrainSettings, model: XUTConfig) -> Iterator[tuple[str, Any, Any]]:
    """Key, value that a run began with, and value of now, of what a run cannot change and is to change."""
    saved = asdict(model_config_from(OmegaConf.to_container(began.model)))  # type: ignore[arg-type]
    yield from ((f"model.{key}", saved[key], value) for key, value in asdict(model).items() if value != saved[key])
    for key, then, now in values_of(began, settings, (*KEPT, *ENCODERS, WHITENED)):
        if key in ENCODERS and same_model(then, now):
            continue
        if key == WHITENED and bool(then) == bool(now):  # measured once, on however many captions
            continue
        if then != now:
            yield key, then, now


def values_of(began: DictConfig, settings: Any, keys: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Each key with the value that a run began with and that of `settings`, a dataclass of the same shape.

    A key that the run's version did not know had its default.
    """
    present, defaults = OmegaConf.structured(settings), OmegaConf.structured(type(settings))
    for key in keys:
        yield key, _plain(began, key, _plain(defaults, key)), _plain(present, key)


def _plain(config: DictConfig, key: str, default: Any = None) -> Any:
    value = OmegaConf.select(config, key, default=default)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
