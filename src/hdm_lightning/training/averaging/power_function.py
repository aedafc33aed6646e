"""Power-function averages of weights (arXiv 2312.02696) on disk, and the reconstruction of any other from them.

An average at time t (in samples) weighs the weights at time τ ≤ t by the profile p(τ) = (γ+1) τ^γ / t^(γ+1). Its
relative width σ is the profile's standard deviation divided by t. Each average and time has one safetensors file, with
the samples seen and the relative width in its header.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import write_atomically

WIDEST = 0.28
"""Largest relative width; at 1/√12 ≈ 0.289 the average would be the plain mean of all weights."""

_ROUNDING = 1e-11
"""Eigenvalues of the inner products below this share of the largest are rounding errors."""


class Profile(NamedTuple):
    """A power-function profile: its end t, above 0, and its exponent γ."""

    samples: float
    gamma: float


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a relative width (section 3.1 of the paper: σ² (γ+2)² (γ+3) = γ+1).

    Raises:
        ValueError: the width is not in (0, `WIDEST`].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel is {sigma_rel}; expected a width above 0 and at most {WIDEST}")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(np.real(roots).max())


def step_decay(sigma_rel: float, samples_seen: float, step: float) -> float:
    """Return the decay β of an average in a step of `step` samples that ends at `samples_seen` (section 3.1).

    For weights that are constant within a step, the product of the decays gives the profile exactly: it telescopes.
    """
    return float(max(0.0, 1.0 - step / samples_seen) ** (gamma_of(sigma_rel) + 1.0))


def inner_product(one: Profile, other: Profile) -> float:
    """Return the integral of the product of two profiles over all time, in closed form (appendix C)."""
    first, last = sorted((one, other), key=lambda profile: profile.samples)
    exponent = one.gamma + other.gamma + 1.0
    ratio = first.samples / last.samples
    share = (one.gamma + 1.0) * (other.gamma + 1.0) / exponent
    return share * ratio**last.gamma / last.samples


def combination(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Return the coefficients (n,) of the combination of stored averages nearest to the wanted one.

    Nearest in the least-squares distance of profiles (section 3.2), with a sum of 1, so that weights keep their scale.

    Raises:
        ValueError: nothing is stored, or nothing at or before the wanted time.
    """
    if not stored:
        raise ValueError("stored is empty; expected at least one profile")
    if min(profile.samples for profile in stored) > wanted.samples:
        raise ValueError(f"wanted ends at {wanted.samples} samples, before every stored profile")
    scaled = [Profile(profile.samples / wanted.samples, profile.gamma) for profile in stored]
    target = Profile(1.0, wanted.gamma)
    # Scaled to unit norm, otherwise narrow early profiles would drown the rest in rounding errors.
    norms = np.array([inner_product(profile, profile) for profile in scaled]) ** 0.5
    products = np.array([[inner_product(one, other) for other in scaled] for one in scaled]) / np.outer(norms, norms)
    aims = np.array([inner_product(profile, target) for profile in scaled]) / norms
    return _constrained(products, aims, 1.0 / norms) / norms


def residual(stored: Sequence[Profile], wanted: Profile, coefficients: np.ndarray) -> float:
    """Return the distance of the combined profile from the wanted one, as a share of the wanted one's norm."""
    profiles = [*stored, wanted]
    signed = np.append(coefficients, -1.0)
    products = np.array([[inner_product(one, other) for other in profiles] for one in profiles])
    return float(np.sqrt(max(0.0, signed @ products @ signed) / inner_product(wanted, wanted)))


def _constrained(products: np.ndarray, aims: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Minimize xᵀAx − 2bᵀx under sᵀx = 1, for a nearly singular symmetric A, on its eigenvectors above rounding."""
    values, vectors = np.linalg.eigh(products)
    kept = values > _ROUNDING * values.max()
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    free, along = inverse @ aims, inverse @ sums
    return np.asarray(free + along * (1.0 - sums @ free) / (sums @ along))


FOLDER = "ema_snapshots"
WORST_FIT = 0.05
"""Largest accepted distance of profiles; above it, the stored averages are too few or too late."""


@dataclass(frozen=True)
class Snapshot:
    """A stored average: its file, the samples seen since the start of the run, and its relative width."""

    path: Path
    samples: int
    sigma_rel: float

    @property
    def profile(self) -> Profile:
        """Its power-function profile."""
        return Profile(float(self.samples), gamma_of(self.sigma_rel))


@dataclass(frozen=True)
class Reconstruction:
    """An average reconstructed from stored ones.

    Attributes:
        tensors: the trained parameters in float32, by the network's names.
        samples: samples seen at its end.
        misfit: distance of its profile from the wanted one, as a share of the wanted one's norm.
        used: number of stored averages combined.
    """

    tensors: dict[str, Tensor]
    samples: int
    misfit: float
    used: int


def width_name(sigma_rel: float) -> str:
    """Return a relative width with three decimals, or with all it has; distinct widths have distinct names."""
    short = f"{sigma_rel:.3f}"
    return short if float(short) == sigma_rel else str(float(sigma_rel))


def snapshot_path(folder: Path, samples: int, sigma_rel: float) -> Path:
    """Return the path of an average's file."""
    return folder / f"{samples:012d}-{width_name(sigma_rel)}.safetensors"


def write_snapshot(
    folder: Path, tensors: Mapping[str, Tensor], samples: int, sigma_rel: float, dtype: torch.dtype
) -> None:
    """Write an average atomically; tensors with values too large for the dtype stay float32."""
    largest = torch.finfo(dtype).max
    cast = {
        name: (value.to(dtype) if value.numel() == 0 or value.abs().max() <= largest else value).cpu().contiguous()
        for name, value in tensors.items()
    }
    # A single entry, since several would be written in an order that changes from run to run.
    metadata = {"ema": json.dumps({"samples_seen": samples, "sigma_rel": sigma_rel})}
    data = save(cast, metadata)
    write_atomically(snapshot_path(folder, samples, sigma_rel), lambda file: file.write(data))


def read_snapshots(folder: Path) -> list[Snapshot]:
    """Return the stored averages, oldest first."""
    found = []
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["ema"])
        found.append(Snapshot(path, int(header["samples_seen"]), float(header["sigma_rel"])))
    return found


def reconstruct(folder: Path, sigma_rel: float, samples: int | None = None) -> Reconstruction:
    """Reconstruct the average of relative width `sigma_rel` at `samples`, by default the last stored time.

    Args:
        folder: folder of the snapshots.
        sigma_rel: relative width in (0, `WIDEST`].
        samples: samples seen; one of the stored times.

    Raises:
        UserError: there are no snapshots, the width is out of range, the time is not stored, or the stored averages
            cannot reconstruct this width.
    """
    stored = read_snapshots(folder)
    if not stored:
        hint = (
            "train with callbacks.weight_averages.sigma_rel=[0.05,0.10] and a callbacks.store_averages.every_n_samples"
        )
        raise UserError("there are no stored averages", where=str(folder), hint=hint)
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"{sigma_rel} is out of range", where="--average", hint=f"use above 0 and at most {WIDEST}")
    times = sorted({snapshot.samples for snapshot in stored})
    at = times[-1] if samples is None else samples
    if at not in times:
        near = min(times, key=lambda time: abs(time - at))
        raise UserError(f"no average was stored at {at} samples", where="--samples", hint=f"use the nearest, {near}")
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
            f"{len(stored)} stored averages reconstruct width {sigma_rel} only with an error of {misfit:.0%}",
            where="--average",
            hint="choose a width closer to theirs, or train with a lower callbacks.store_averages.every_n_samples",
        )
    return Reconstruction(_weighted_sum(stored, coefficients.tolist()), at, misfit, len(stored))


def _weighted_sum(stored: list[Snapshot], coefficients: list[float]) -> dict[str, Tensor]:
    """Sum in float64, reading one file at a time."""
    total: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(stored, coefficients, strict=True):
        with safe_open(snapshot.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                value = file.get_tensor(name).double()
                total[name] = value * coefficient if name not in total else total[name].add_(value, alpha=coefficient)
    return {name: value.float() for name, value in total.items()}
