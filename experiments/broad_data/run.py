"""From addresses to a trained model: `python -m experiments.broad_data.run`; see README.md."""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.broad_data.commands import measured
from experiments.broad_data.stand_in import Sizes, fetch, imitate
from experiments.broad_data.web import Web
from experiments.study_jobs import TOP, circumstances


def fetched(work: Path, sizes: Sizes, img2dataset: str | None) -> dict[str, Any]:
    """Make the set, unless it is there; what that took."""
    note = work / "fetched.json"
    if not note.exists():
        shutil.rmtree(work / "set", ignore_errors=True)
        took: dict[str, Any] = {}
        with measured(took, "fetch"):
            web = Web(TOP / "data" / "openclipart-mini")
            fetch(web, work / "set", sizes, img2dataset) if img2dataset else imitate(web, work / "set", sizes)
        by = "img2dataset" if img2dataset else "an imitation of img2dataset"
        note.write_text(json.dumps({**took["fetch"], "by": by, "addresses": vars(sizes), "made": circumstances()}))
    return json.loads(note.read_text())


def main(given: Sequence[str] | None = None) -> None:
    """All steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=61_000)
    parser.add_argument("--work", type=Path, default=Path("runs/broad_data"))
    parser.add_argument("--img2dataset", default=shutil.which("img2dataset"))
    arguments = parser.parse_args(given)
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    print(fetched(work, Sizes(arguments.rows), arguments.img2dataset))


if __name__ == "__main__":
    main()
