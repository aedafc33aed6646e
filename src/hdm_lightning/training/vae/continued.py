"""What an autoencoder's run has left on disk and what it is to go on with: whether the one belongs to the other."""

from pathlib import Path
from typing import Any

from hdm_lightning.encoders.sources import same_model
from hdm_lightning.training import run_folder
from hdm_lightning.training.continued import OF_THE_MACHINE, check_finished, configuration_of, raise_changed, values_of
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.training.vae.settings import VaeTrainSettings

SOURCE = "autoencoder.source"
ADVERSARIAL = "adversarial.weight"
JUDGE = ("adversarial.channels", "adversarial.layers", "adversarial.norm")
AVERAGES = "ema.halflife_samples"
KEPT = ("autoencoder.config", SOURCE, "autoencoder.train_encoder", "stage.batch_size", ADVERSARIAL, AVERAGES)
TRAINED = ("seed", "stage", "loss", "equivariance", "patches", "adversarial", "ema", "data")
"""What the card of a finished training tells, or what its weights come of."""
FINISHED_MEND = "restore it, or choose another name=; autoencoder.source=RUN/final starts a new run from its result"
HINT = "restore it, or choose another name=; autoencoder.source= starts a new run from a trained autoencoder"


def check_vae_continued(settings: VaeTrainSettings, plan: StagePlan) -> None:
    """What a run has left on disk can be gone on from with these settings.

    Raises:
        UserError: naming what a run keeps: the networks, what of them is trained, and what a step is.
    """
    run_dir = Path(settings.run_dir)
    began = configuration_of(run_dir)
    if began is None or run_folder.newest_checkpoint(run_dir, plan) is None:
        return
    if run_folder.stage_is_done(run_dir, plan):
        check_finished(run_dir, settings, TRAINED, OF_THE_MACHINE, FINISHED_MEND)
    judged = JUDGE if settings.adversarial.weight else ()
    for key, then, now in values_of(began, settings, (*KEPT, *judged)):
        if not _may_be(key, then, now):
            raise_changed(run_dir, key, then, now, HINT, may_have_moved=key == SOURCE)


def _may_be(key: str, then: Any, now: Any) -> bool:
    """Whether a run that began with one value of a key can go on with the other."""
    if key == ADVERSARIAL:  # another weight is the same two networks
        return bool(then) == bool(now)
    if key == AVERAGES:  # one of another half-life starts from the nearest
        return bool(then) or not now
    if key == SOURCE and then and now:
        return same_model(then, now)
    return bool(then == now)
