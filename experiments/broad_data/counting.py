"""Contents of an img2dataset folder, counted with tarfile, Pillow and pyarrow alone, without this package."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class Seen:
    """One sample."""

    name: str
    """`SHARD.tar/KEY`."""
    fault: str
    """Empty, or why it is unusable."""
    sides: tuple[int, int]
    text: str
    record: dict[str, Any]


def samples(folder: Path) -> list[Seen]:
    """Return every sample that an archive has any part of."""
    found = []
    for tar in sorted(folder.glob("*.tar")):
        own = [_seen(f"{tar.name}/{key}", parts) for key, parts in _groups(tar)]
        if not _has_end(tar):  # its last sample may be incomplete
            own[-1] = replace(own[-1], fault="last of a cut archive")
        found += own
    return found


def _has_end(tar: Path) -> bool:
    with tar.open("rb") as file:
        file.seek(-1024, io.SEEK_END)
        return not any(file.read())


def _groups(tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    found: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(tar, "r|") as archive:
            for member in archive:
                key, _, kind = member.name.partition(".")
                content = archive.extractfile(member).read()  # type: ignore[union-attr]
                if len(content) == member.size:
                    found.setdefault(key, {})[kind] = content
    except tarfile.ReadError:  # where the archive was cut
        pass
    yield from found.items()


def _seen(name: str, parts: dict[str, bytes]) -> Seen:
    record = json.loads(parts["json"]) if "json" in parts else {}
    text = parts.get("txt", b"").decode()
    fault, sides = "", (0, 0)
    try:
        with Image.open(io.BytesIO(parts.get("jpg", b""))) as image:
            sides = image.size
            image.load()
    except OSError as error:
        fault = "half an image" if sides[0] else "no image"
        assert sides[0] or "identify" in str(error), error
    return Seen(name, fault or ("" if text.strip() else "no text"), sides, text, record)


def counts(folder: Path, found: list[Seen]) -> dict[str, Any]:
    """Count the addresses by the tables and statistics, and the samples by their archives."""
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in _rows(path)]
    stats = [json.loads(path.read_text()) for path in sorted(folder.glob("*_stats.json"))]
    return {
        "rows": len(rows),
        "rows_by_status": dict(Counter(row["status"] for row in rows)),
        "rows_by_error": dict(Counter(row["error_message"] for row in rows if row["error_message"]).most_common()),
        "statistics": {key: sum(each[key] for each in stats) for key in ("count", "successes")},
        "samples": len(found),
        "faults": dict(Counter(each.fault for each in found if each.fault)),
        "good": sum(not each.fault for each in found),
        "different_texts": len({each.text for each in found}),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.tar")),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.ParquetFile(path).read(["key", "status", "error_message"]).to_pylist()
    except pa.ArrowInvalid:  # from the download that was killed
        return []
