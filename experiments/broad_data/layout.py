"""Check whether two folders have the same layout: `python -m experiments.broad_data.layout FOLDER FOLDER`.

Compared are the first shard, its table and its statistics: names and order of members, their tar headers, keys of
records and the types of their values, columns, names of statistics. The images themselves are not compared.
"""

import argparse
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def layout(folder: Path) -> dict[str, Any]:
    """Return everything that is compared."""
    tar = sorted(folder.glob("*.tar"))[0]
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
        read = {each.name: archive.extractfile(each).read() for each in members if each.name.endswith(".json")}
    records = {name: json.loads(content) for name, content in read.items()}
    rows = pq.read_table(tar.with_suffix(".parquet"))
    stats = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_text())
    own = ("duration", "start_time", "end_time")
    return {
        "shards": sorted(path.name for path in folder.iterdir() if path.suffix in (".tar", ".parquet")),
        "members": sorted(each.name for each in members),
        "order in a sample": {tuple(each.name.partition(".")[2] for each in members[at : at + 3]) for at in (0, 3, 6)},
        "notes of tar": {(oct(each.mode), each.uname, each.gname, tuple(each.pax_headers)) for each in members},
        "records": {name: {key: type(value) for key, value in each.items()} for name, each in records.items()},
        "order of keys": {tuple(each) for each in records.values()},
        "indent": {content[:6] for content in read.values()},
        "columns": [(field.name, field.type) for field in rows.schema],
        "rows": {row["key"]: _without(row, ("url",)) for row in rows.to_pylist()},
        "statistics": {key: None if key in own else value for key, value in stats.items()},
    }


def _without(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def main() -> int:
    """Print the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER")
    folders = parser.parse_args().folders
    for folder in folders:
        if not any(folder.glob("*.tar")):
            parser.error(f"{folder} has no shards")
    one, two = map(layout, folders)
    differing = [name for name in one if one[name] != two[name]]
    print(f"{len(one) - len(differing)} of {len(one)} facts are the same; different: {differing}")
    for name in differing:
        print(name, str(one[name])[:1000], str(two[name])[:1000], sep="\n  ")
    return bool(differing)


if __name__ == "__main__":
    raise SystemExit(main())
