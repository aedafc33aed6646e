"""hdm-convert --average: a run's model with weights averaged over another length than any it was trained with."""

import copy
from dataclasses import replace
from pathlib import Path

from hdm_lightning.errors import UserError
from hdm_lightning.interop.release import Release
from hdm_lightning.training.averaging.reconstruction import FOLDER, reconstruct


def with_average(release: Release, run_dir: Path, sigma_rel: float, samples: int | None) -> tuple[Release, str]:
    """The release with the average of relative width `sigma_rel` in place of its weights, and a line about it.

    Args:
        release: what the run has exported.
        run_dir: the run's folder, with its snapshots.
        sigma_rel: relative width of the power-function average (arXiv 2312.02696).
        samples: samples seen at which it ends; None for the last stored.

    Raises:
        UserError: the folder has no snapshots, or they do not give this average, or are of another network.
    """
    found = reconstruct(run_dir / FOLDER, sigma_rel, samples)
    network = copy.deepcopy(release.network).float()
    try:
        network.load_state_dict({**network.state_dict(), **found.tensors})
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"the stored averages are of another network than the run's model: {first}",
            where=str(run_dir / FOLDER),
            hint="give the folder of the run that stored them",
        ) from error
    told = (
        f"average of relative width {sigma_rel:g} at {found.samples:,} samples, from {found.used} stored; "
        f"its profile is met to {found.misfit:.2%}"
    )
    return replace(release, network=network), told
