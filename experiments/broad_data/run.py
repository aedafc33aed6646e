"""From addresses to a trained model: `python -m experiments.broad_data.run`; see README.md."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.broad_data import counting
from experiments.broad_data.commands import done, measured
from experiments.broad_data.seen import lines
from experiments.broad_data.stand_in import Sizes, fetch, imitate
from experiments.broad_data.train import BATCH, autoencoder, order, train
from experiments.broad_data.web import Web
from experiments.study_jobs import TOP, circumstances, write_result

from hdm_lightning.data.index import load_index

HERE = Path(__file__).parent
LIMITS = [
    ["--min", "aesthetic_score_laion_v2=4.5", "--max", "watermark_score=0.5"],
    ["--min", "short_side=32", "caption_words=3", "--max", "aspect=3"],
]
"""As in docs/tutorials/web_sets.md, except for the short side: these images are small."""

KEEPS: list[Callable[[counting.Seen], bool]] = [
    lambda seen: seen.record["aesthetic_score_laion_v2"] >= 4.5 and seen.record["watermark_score"] <= 0.5,
    lambda seen: min(seen.sides) >= 32 and len(seen.text.split()) >= 3 and max(seen.sides) <= 3 * min(seen.sides),
]
"""The same limits, written without the package."""

LARGEST_UPSCALE = 1.5
"""As in `data=coyo700m`."""


def once(work: Path, name: str, part: Callable[[], Any]) -> dict[str, Any]:
    """Return the result and cost of a part, from its file if it is done."""
    note = work / f"{name}.json"
    if not note.exists():
        took: dict[str, Any] = {}
        with measured(took, "took"):
            found = part()
        note.write_text(json.dumps({"found": found, **took, "made": circumstances()}))
    return json.loads(note.read_text())


def fetched(shards: Path, sizes: Sizes, img2dataset: str | None) -> dict[str, Any]:
    """Make the set; return how it was made, and its size."""
    shutil.rmtree(shards, ignore_errors=True)
    web = Web(TOP / "data" / "openclipart-mini")
    fetch(web, shards, sizes, img2dataset) if img2dataset else imitate(web, shards, sizes)
    return {"by": "img2dataset" if img2dataset else "an imitation of img2dataset", "addresses": vars(sizes)}


def counted(shards: Path) -> dict[str, Any]:
    """Count the set without this package, and which samples each filter keeps."""
    found = counting.samples(shards)
    good = [each for each in found if not each.fault]
    first = [each for each in good if KEEPS[0](each)]
    both = [each for each in first if KEEPS[1](each)]
    large = [each.name for each in both if LARGEST_UPSCALE * min(each.sides) >= 64]
    kept = {"by_scores": len(first), "by_both": len(both), "of_them_large_enough_for_64px": len(large)}
    return {"numbers": {**counting.counts(shards, found), "kept": kept}, "large": large}


def prepared(shards: Path) -> list[dict[str, Any]]:
    """Index, inspect and filter with the tutorial's commands; return what each printed, and the counts of the index."""
    steps = [("build", "img2dataset", str(shards)), ("verify", "--decode", "--mark", str(shards))]
    steps += [("stats", str(shards)), ("show", str(shards), "--out", str(shards.parent / "sheet.png"))]
    steps += [("filter", str(shards), "--dry-run", *LIMITS[0])]
    steps += [("filter", str(shards), "--mark", *each) for each in LIMITS]
    found = []
    for words in steps:
        name, took = " ".join(word for word in words if "/" not in word), {}
        with measured(took, "took"):
            said = done("shards", *words, may_find=words[0] == "verify")
        index = load_index(shards)
        usable = {"samples": index.samples, "left_out": sum(len(each.skip) for each in index.shards)}
        found.append({"command": f"hdm-shards {name}", **usable, **took, "said": said[-40:]})
    return found


def whole_steps(samples: int) -> int:
    """Return the smallest multiple of the batch size that is at least `samples`."""
    return -(-samples // BATCH) * BATCH


def main(given: Sequence[str] | None = None) -> None:
    """Run all steps; status 1 if the trainings did not see what they should have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=61_000, help="addresses in the first download")
    parser.add_argument("--more", type=int, default=1_000, help="addresses in each of the other two")
    parser.add_argument("--per-shard", type=int, default=1_000)
    parser.add_argument("--second-stage", type=int, default=2_048, help="samples at 128 px")
    parser.add_argument("--vae-samples", type=int, default=4_000)
    parser.add_argument("--kills", type=float, nargs="*", default=[0.4, 0.97], help="at these shares of the samples")
    parser.add_argument("--work", type=Path, default=Path("runs/broad_data"))
    parser.add_argument("--img2dataset", default=shutil.which("img2dataset"), help="path; if empty, it is imitated")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    arguments = parser.parse_args(given)
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    shards, vae = work / "set", work / "vae"
    sizes = Sizes(arguments.rows, arguments.more, arguments.more, arguments.per_shard)
    parts = {"fetched": once(work, "fetched", lambda: fetched(shards, sizes, arguments.img2dataset))}
    parts["counted"] = once(work, "counted", lambda: counted(shards))
    large = parts["counted"]["found"].pop("large")
    parts["prepared"] = once(work, "prepared", lambda: prepared(shards))
    parts["autoencoder"] = once(work, "autoencoder", lambda: autoencoder(shards, vae, arguments.vae_samples))
    samples = {"px64": whole_steps(len(large)), "px128": whole_steps(arguments.second_stage)}
    trainings = {"whole": [], "killed": arguments.kills}
    for name, kills in trainings.items():
        parts[name] = once(work, f"{name}_run", partial(train, shards, work / name, vae, samples, kills))
    seen = {name: order(lines(work / f"{name}-seen"), "px64") for name in trainings}
    names = {name: [key for place in range(len(large)) for key, good in seen[name][place] if good] for name in seen}
    runs = {name: parts[name]["found"] for name in trainings}
    compared = {
        "the pass is every sample once": sorted(names["whole"]) == sorted(large),
        "so is the killed one": sorted(names["killed"]) == sorted(large),
        "killed has the order of whole": _orders(runs["killed"]) == _orders(runs["whole"]),
        "killed has the weights of whole": runs["killed"]["weights_sha256"] == runs["whole"]["weights_sha256"],
    }
    write_result(arguments.out, {**parts, "compared": compared, "made": circumstances()})
    print(json.dumps({**parts, "compared": compared}, indent=1))
    if not all(compared.values()):
        sys.exit(1)


def _orders(run: dict[str, Any]) -> dict[str, str]:
    return {name: stage["order_sha256"] for name, stage in run["stages"].items()}


if __name__ == "__main__":
    main()
