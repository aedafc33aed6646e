"""Captions added to the record of a sample, beside those that it has."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hdm_lightning.data.captions import MAX_RECORD_BYTES, CaptionRules, captions_under, parse_record
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.sample_table import RawSample
from hdm_lightning.datasets.writer import Field


def with_captions(raw: RawSample, new: Sequence[Mapping[str, object]], faults: list[list[str]]) -> dict[str, Field]:
    """The members of a sample with captions added to the list `captions` of its record, behind those it has.

    A record that cannot be read is left out for the new one, and noted in `faults`.
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
        faults.append([raw.key, "the record would be too long with its captions"])
        return members
    return {**members, "json": content}


def _taken_over(record: dict[str, Any], key: str, faults: list[list[str]]) -> list[object]:
    """The captions of a record that a training reads, taken out of it: beside new ones they have to be in one list.

    What cannot be read as captions would make the new ones unreadable; it is left out, and noted in `faults`.
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
