"""Add captions to the record of a sample, after those that it has."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hdm_lightning.data.captions import MAX_RECORD_BYTES, CaptionRules, captions_under, parse_record
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.sample_table import RawSample
from hdm_lightning.datasets.writer import Field


def with_captions(raw: RawSample, new: Sequence[Mapping[str, object]], faults: list[list[str]]) -> dict[str, Field]:
    """Return the members of a sample with captions appended to the `captions` list of its record.

    A record that cannot be read is replaced by a new one, and noted in `faults`.
    """
    members: dict[str, Field] = dict(raw.members)
    if not new:
        return members
    try:
        record = parse_record(raw.members["json"]) if "json" in raw.members else {}
    except SampleFault as fault:
        record = {}
        faults.append([raw.key, f"record left out: {fault}"])
    record["captions"] = [*_taken_over(record, raw.key, faults), *new]
    content = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(content) > MAX_RECORD_BYTES:
        faults.append([raw.key, "the record would be too long with the new captions"])
        return members
    return {**members, "json": content}


def _taken_over(record: dict[str, Any], key: str, faults: list[list[str]]) -> list[object]:
    """Remove and return the captions of a record that training would read: they must be in one list with new ones.

    Values that cannot be read as captions would make the new ones unreadable; they are removed, and noted in `faults`.
    """
    there = [name for name in CaptionRules().fields if record.get(name) and _are_captions(record, name, key, faults)]
    if not there:
        return []
    present = record.pop(there[0])
    items = present if isinstance(present, list) else [present]
    if there[0] == "captions":
        return items
    return [{"kind": there[0], **(each if isinstance(each, dict) else {"text": each})} for each in items]


def _are_captions(record: dict[str, Any], name: str, key: str, faults: list[list[str]]) -> bool:
    try:
        captions_under(record[name], name)
    except SampleFault as fault:
        del record[name]
        faults.append([key, f"{name} of the record left out: {fault}"])
        return False
    return True
