"""Which combinations of the four techniques are trained: a resolvable fraction of all 48, chosen by its model matrix.

An intercept, the seven main effects and the seventeen two-way interactions are 25 parameters, too many for any 24
cells. Each seed therefore gets 24 cells of its own, in two blocks of twelve with an autoencoder pair each, and the
three seeds together can estimate all of them. `python -m experiments.synergy.design` rewrites design.json.
"""

import itertools
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FACTORS: dict[str, tuple[str, ...]] = {
    "skips": ("mirrored", "last", "none", "concatenation"),
    "routing": ("0", "0.5"),
    "eq": ("off", "on"),
    "crop": ("centre", "shifted", "buckets"),
}
SEEDS, PAIRS, BLOCK = 3, 2, 12
"""Number of training seeds, of autoencoder pairs per seed, and of cells per block."""
FILE = Path(__file__).parent / "design.json"
_OUT = PAIRS
_STARTS = 4

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One combination of the techniques."""

    skips: str
    routing: str
    eq: str
    crop: str


@dataclass(frozen=True)
class Planned:
    """A training: its cell, its seed and which of the seed's autoencoder pairs it uses."""

    cell: Cell
    seed: int
    pair: int

    @property
    def block(self) -> int:
        """Number of the autoencoder pair over all seeds, which is also the autoencoders' seed."""
        return PAIRS * self.seed + self.pair

    @property
    def name(self) -> str:
        """Name of the job."""
        cell = self.cell
        return f"{cell.skips}-routing{cell.routing}-eq_{cell.eq}-{cell.crop}-seed{self.seed}-vae{self.block}"


def all_cells() -> list[Cell]:
    """Return the full factorial, 48 cells."""
    return [Cell(*levels) for levels in itertools.product(*FACTORS.values())]


def contrasts(levels: int) -> Matrix:
    """Return orthogonal contrasts of a factor's levels (levels, levels − 1), each column with mean 0, mean square 1."""
    return np.linalg.qr(np.column_stack([np.ones(levels), np.eye(levels)[:, 1:]]))[0][:, 1:] * levels**0.5


def terms(cells: list[Cell]) -> dict[str, Matrix]:
    """Return the columns of each main effect and two-way interaction, named `skips`, `skips:routing`, …."""
    codes = {}
    for name, levels in FACTORS.items():
        rows = [levels.index(getattr(cell, name)) for cell in cells]
        codes[name] = contrasts(len(levels))[rows]
    found = dict(codes)
    for one, other in itertools.combinations(FACTORS, 2):
        products = codes[one][:, :, None] * codes[other][:, None, :]
        found[f"{one}:{other}"] = products.reshape(len(cells), -1)
    return found


def model_matrix(planned: list[Planned]) -> Matrix:
    """Return the columns of blocks, main effects and two-way interactions: (jobs, 6 + 24)."""
    blocks = np.eye(SEEDS * PAIRS)[[each.block for each in planned]]
    return np.column_stack([blocks, *terms([each.cell for each in planned]).values()])


@cache
def planned() -> tuple[Planned, ...]:
    """Return the stored design in the order in which it is run: block by block, shuffled within."""
    rows = json.loads(FILE.read_text())["trainings"]
    return tuple(Planned(Cell(**row["cell"]), row["seed"], row["pair"]) for row in rows)


def search(seed: int = 0) -> list[Planned]:
    """Return the design of largest determinant that exchanges find from a few random starts (D-optimality)."""
    random = np.random.default_rng(seed)
    cells = all_cells()
    effects = np.column_stack(list(terms(cells).values()))
    best = max((_exchanged(effects, _random_labels(random)) for _ in range(_STARTS)), key=lambda found: found[0])[1]
    blocks = [
        [
            Planned(cells[row], number // PAIRS, number % PAIRS)
            for row in np.flatnonzero(best[number // PAIRS] == number % PAIRS)
        ]
        for number in range(SEEDS * PAIRS)
    ]
    return [block[row] for block in blocks for row in random.permutation(len(block))]


def _random_labels(random: np.random.Generator) -> NDArray[np.int64]:
    """Return for each seed and cell the pair that trains it, or `_OUT`: (SEEDS, 48)."""
    labels = np.repeat([*range(PAIRS), _OUT], [BLOCK] * PAIRS + [48 - PAIRS * BLOCK])
    return np.array([random.permutation(labels) for _ in range(SEEDS)])


def _exchanged(effects: Matrix, labels: NDArray[np.int64]) -> tuple[float, NDArray[np.int64]]:
    """Swap two cells of a seed as long as that increases the determinant."""
    value, gained = _log_determinant(effects, labels), True
    while gained:
        gained = False
        for seed in range(SEEDS):
            for one, other in itertools.combinations(range(labels.shape[1]), 2):
                if labels[seed, one] == labels[seed, other]:
                    continue
                labels[seed, [one, other]] = labels[seed, [other, one]]
                tried = _log_determinant(effects, labels)
                if tried > value + 1e-9:
                    value, gained = tried, True
                else:
                    labels[seed, [one, other]] = labels[seed, [other, one]]
    return value, labels


def _log_determinant(effects: Matrix, labels: NDArray[np.int64]) -> float:
    seeds, rows = np.nonzero(labels != _OUT)
    blocks = np.eye(SEEDS * PAIRS)[PAIRS * seeds + labels[seeds, rows]]
    matrix = np.column_stack([blocks, effects[rows]])
    sign, value = np.linalg.slogdet(matrix.T @ matrix)
    return float(value) if sign > 0 else -np.inf


def main() -> None:
    """Search for the design and store it."""
    found = search()
    rows = [{"seed": each.seed, "pair": each.pair, "cell": asdict(each.cell)} for each in found]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    FILE.write_text(f'{{"search_seed": 0, "trainings": [\n  {lines}\n]}}\n')
    matrix = model_matrix(found)
    print(f"{len(found)} trainings, rank {np.linalg.matrix_rank(matrix)} of {matrix.shape[1]}")


if __name__ == "__main__":
    main()
