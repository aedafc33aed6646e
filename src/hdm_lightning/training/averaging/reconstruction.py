"""Power-function averages on disk, and any average put together from them when training is over.

One safetensors file per average and time, with the samples seen and the relative width in its header.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.training.averaging.power_function import WIDEST, Profile, combination, gamma_of, residual
from hdm_lightning.whole_files import write_atomically

FOLDER = "ema_snapshots"
WORST_FIT = 0.05
"""Distance of profiles above which a combination is refused: the stored ones are too few or too late."""


@dataclass(frozen=True)
class Snapshot:
    """A stored average.

    Attributes:
        path: its file.
        samples: samples seen since the start of the run.
        sigma_rel: its relative width.
    """

    path: Path
    samples: int
    sigma_rel: float

    @property
    def profile(self) -> Profile:
        """How it weighs the weights of the run."""
        return Profile(float(self.samples), gamma_of(self.sigma_rel))


@dataclass(frozen=True)
class Reconstruction:
    """An average put together from stored ones.

    Attributes:
        tensors: the trained parameters in float32, by the network's names.
        samples: samples seen where it ends.
        misfit: distance of its profile from the wanted one, as a share of the wanted one's norm.
        used: how many stored averages it is made of.
    """

    tensors: dict[str, Tensor]
    samples: int
    misfit: float
    used: int


def snapshot_path(folder: Path, samples: int, sigma_rel: float) -> Path:
    """The file of an average."""
    return folder / f"{samples:012d}-{sigma_rel:.3f}.safetensors"


def write_snapshot(
    folder: Path, tensors: Mapping[str, Tensor], samples: int, sigma_rel: float, dtype: torch.dtype
) -> None:
    """Write an average atomically; what does not fit the dtype stays float32."""
    largest = torch.finfo(dtype).max
    cast = {
        name: (value.to(dtype) if value.numel() == 0 or value.abs().max() <= largest else value).cpu().contiguous()
        for name, value in tensors.items()
    }
    # One entry: more would be written in an order that changes from run to run.
    metadata = {"ema": json.dumps({"samples_seen": samples, "sigma_rel": sigma_rel})}
    data = save(cast, metadata)
    write_atomically(snapshot_path(folder, samples, sigma_rel), lambda file: file.write(data))


def read_snapshots(folder: Path) -> list[Snapshot]:
    """The stored averages, oldest first."""
    found = []
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["ema"])
        found.append(Snapshot(path, int(header["samples_seen"]), float(header["sigma_rel"])))
    return found


def reconstruct(folder: Path, sigma_rel: float, samples: int | None = None) -> Reconstruction:
    """The average of relative width `sigma_rel` at `samples`, by default the last time stored.

    Args:
        folder: of the snapshots.
        sigma_rel: in (0, `WIDEST`].
        samples: samples seen; one of the times stored.

    Raises:
        UserError: no snapshots, a width out of range, a time that is not stored, or stored averages that are too few
            for this width.
    """
    stored = read_snapshots(folder)
    if not stored:
        hint = "train with callbacks.ema.sigma_rel=[0.05,0.10] and a snapshot_every"
        raise UserError("there are no stored averages", where=str(folder), hint=hint)
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"{sigma_rel} is no relative width", where="--average", hint=f"above 0, at most {WIDEST}")
    times = sorted({snapshot.samples for snapshot in stored})
    at = times[-1] if samples is None else samples
    if at not in times:
        near = min(times, key=lambda time: abs(time - at))
        raise UserError(f"no average was stored at {at} samples", where="--samples", hint=f"the nearest is {near}")
    return _combined([snapshot for snapshot in stored if snapshot.samples <= at], sigma_rel, at)


def _combined(stored: list[Snapshot], sigma_rel: float, at: int) -> Reconstruction:
    exact = [snapshot for snapshot in stored if (snapshot.samples, snapshot.sigma_rel) == (at, sigma_rel)]
    if exact:
        return Reconstruction(_weighted_sum(exact, [1.0]), at, 0.0, 1)
    profiles, wanted = [snapshot.profile for snapshot in stored], Profile(float(at), gamma_of(sigma_rel))
    coefficients = combination(profiles, wanted)
    misfit = residual(profiles, wanted, coefficients)
    if misfit > WORST_FIT:
        raise UserError(
            f"{len(stored)} stored averages give width {sigma_rel} only to {misfit:.0%}",
            where="--average",
            hint="ask for a width nearer to the stored ones, or store more often (callbacks.ema.snapshot_every)",
        )
    return Reconstruction(_weighted_sum(stored, coefficients.tolist()), at, misfit, len(stored))


def _weighted_sum(stored: list[Snapshot], coefficients: list[float]) -> dict[str, Tensor]:
    """Summed in float64, one file at a time."""
    total: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(stored, coefficients, strict=True):
        with safe_open(snapshot.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                value = file.get_tensor(name).double()
                total[name] = value * coefficient if name not in total else total[name].add_(value, alpha=coefficient)
    return {name: value.float() for name, value in total.items()}
