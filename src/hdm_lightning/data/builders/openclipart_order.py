"""In which order the drawings are taken: by lot, or so that every folder gets its turn."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from hdm_lightning.data.builders.openclipart_records import Record


def by_lot(records: Iterable[Record], seed: int) -> list[Record]:
    """Return the records shuffled, the same way for the same seed whatever their order was."""
    ordered = sorted(records, key=lambda record: record.path)
    return [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]


def folders_in_turn(records: Iterable[Record], seed: int) -> list[Record]:
    """Return the records in rounds: in each round one of every folder that has any left, in an order by lot.

    A beginning of this order holds as many drawings of small folders as of large ones, as long as they last.
    """
    folders: dict[str, list[Record]] = defaultdict(list)
    for record in by_lot(records, seed):
        folders[record.folder].append(record)
    rng = np.random.default_rng([seed, 1])
    names, ordered = sorted(folders), []
    for turn in range(max((len(group) for group in folders.values()), default=0)):
        ordered += [folders[names[i]][turn] for i in rng.permutation(len(names)) if turn < len(folders[names[i]])]
    return ordered
