"""In which order the drawings are taken: by lot, or so that every folder gets its turn.

Lots are hashes of the seed and a name, so that a drawing that is left out does not move the others.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from hdm_lightning.data.builders.openclipart_records import Record


def by_lot(records: Iterable[Record], seed: int) -> list[Record]:
    """Return the records shuffled, the same way for the same seed whatever their order was."""
    return sorted(records, key=lambda record: _lot(seed, record.path))


def folders_in_turn(records: Iterable[Record], seed: int) -> list[Record]:
    """Return the records in rounds: in each round one of every folder that has any left, folders by lot.

    A beginning of this order holds as many drawings of small folders as of large ones, as long as they last.
    """
    folders: dict[str, list[Record]] = defaultdict(list)
    for record in by_lot(records, seed):
        folders[record.folder].append(record)
    turns = (
        (turn, _lot(seed, f"{turn} {name}"), record)
        for name, group in folders.items()
        for turn, record in enumerate(group)
    )
    return [record for _, _, record in sorted(turns, key=lambda entry: entry[:2])]


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
