"""What two builds of the same must have in common: every byte, but for when the shards were written."""

import re


def without_times(path):
    """The bytes of a file; of an index without the times of its shards."""
    data = path.read_bytes()
    return re.sub(rb'"changed": \d+', b'"changed": 0', data) if path.name == "index.json" else data
