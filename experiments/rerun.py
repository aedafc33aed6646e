"""Rerun recorded experiments and report what moved: `python -m experiments.rerun [NAME ...]`, from the top folder.

`rerun.yaml` lists what each one runs, which of its numbers are compared, and by which rule. Everything happens in a
copy (`runs/rerun/tree`), so recorded results stay as they are; a command that is done is skipped, and one that was
interrupted resumes if it can. `runs/rerun/report.json` has every number, and is updated after each experiment.
Status 1: something moved, or a command failed.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments.study_jobs import circumstances
from omegaconf import OmegaConf

from hdm_lightning.metrics.quantiles import t_quantile

HERE = Path(__file__).parent
CONFIDENCE = 0.95
_ONE_OF_SEVERAL = re.compile(r"(seed|vae)\d+")
_DONE = "done.txt"


@dataclass(frozen=True)
class Compared:
    """A recorded number and the same one measured again.

    Attributes:
        file, key: where it is.
        recorded, again: the numbers; for several trainings, their means.
        limit: the largest difference that can be chance; None if a single training gives no interval.
        moved: whether they differ by more.
        by_seeds: whether the limit comes from the spread over seeds.
    """

    file: str
    key: str
    recorded: Any
    again: Any
    limit: float | None
    moved: bool
    by_seeds: bool = False


def main() -> None:
    """Run, compare and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    experiments: Any = OmegaConf.to_container(OmegaConf.load(HERE / "rerun.yaml"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(experiments)} (default: all)")
    parser.add_argument("--tree", type=Path, default=Path("runs/rerun/tree"))
    parser.add_argument("--fresh", action="store_true", help="discard what earlier calls have done")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(experiments):
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}; there are {', '.join(experiments)}")
    chosen = {name: experiments[name] for name in arguments.names or experiments}
    tree = copied(arguments.tree.absolute(), fresh=arguments.fresh)
    report: dict[str, Any] = {"made": circumstances()}
    for name, what in chosen.items():
        print(f"{name}: about {what['minutes']} min", flush=True)
        failed, found = run(name, what, tree), []
        try:
            found = found if failed else compare(HERE / name, tree / "experiments" / name, what["compare"])
        except ValueError as error:  # must not lose the others
            failed = str(error)
        report[name] = {"failed": failed, "numbers": [asdict(each) for each in found]}
        print(summary(name, failed, found), flush=True)
        (tree.parent / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    moved = any(row["moved"] for name in chosen for row in report[name]["numbers"])
    sys.exit(1 if moved or any(report[name]["failed"] for name in chosen) else 0)


def copied(tree: Path, *, fresh: bool) -> Path:
    """Return a copy of the experiments that commands may write to, next to a link to the data."""
    if fresh:
        shutil.rmtree(tree, ignore_errors=True)
    if not tree.exists():
        half = tree.with_name(f"{tree.name}.half")  # an interrupted copy does not count
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(HERE, half / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
        (half / "data").symlink_to(HERE.parent / "data")
        half.rename(tree)
    return tree


def run(name: str, what: Mapping[str, Any], tree: Path) -> str | None:
    """Run the commands that are not done yet; return the one that failed, or None."""
    done = tree / f"{name}-{_DONE}"
    if not done.exists():
        for stale in what.get("fresh", ()):
            shutil.rmtree(tree / "experiments" / name / stale, ignore_errors=True)
        for pattern in what.get("compare", ()):  # else one that no command rewrites would be compared with itself
            for record in (tree / "experiments" / name).glob(pattern):
                record.unlink()
        done.touch()
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in what["commands"]:
        if command in done.read_text().splitlines():
            continue
        print(f"  {command}", flush=True)
        with (tree / f"{name}.log").open("a") as log:
            ended = subprocess.run(
                ["bash", "-c", command],
                cwd=tree,
                env={**os.environ, "PATH": programs},
                stderr=log,
                stdout=log,
                check=False,
            )
        if ended.returncode:
            return str(command)
        with done.open("a") as file:
            file.write(f"{command}\n")
    return None


def compare(recorded: Path, again: Path, rules: Mapping[str, Mapping[str, Any]]) -> list[Compared]:
    """Compare every number that the rules name, as recorded and as measured again.

    Raises:
        ValueError: a rule matches no number, or a recorded number is missing from the new results.
    """
    found = []
    for pattern, keys in rules.items():
        files = sorted((path.relative_to(recorded) for path in recorded.glob(pattern)), key=_group)
        for group, several in groupby(files, key=_group):
            members = sorted(several)
            before, now = _values(recorded, members), _values(again, members)
            for key, rule in keys.items():
                names = [name for name in before if _matches(name, key)]
                found += [_compared(group, name, before[name], now.get(name), rule) for name in names]
    if not found:
        raise ValueError(f"{recorded}: no number is compared")
    return found


def _group(path: Path) -> str:
    """Return what files of the same training with different seeds have in common."""
    return _ONE_OF_SEVERAL.sub(r"\1*", str(path))


def _values(folder: Path, files: Sequence[Path]) -> dict[str, list[Any]]:
    """Return lists of values by key: one value per file, or, from one file, the list at the key."""
    values: dict[str, list[Any]] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{file} is recorded, but missing from the new results")
        for key, value in _leaves(json.loads((folder / file).read_text())):
            values.setdefault(key, []).append(value)
    return values


def _leaves(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield plain values and lists of numbers with their dotted keys; positions in a list count as keys."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, f"{key}.{name}" if key else name)
    elif isinstance(content, list) and not all(isinstance(each, int | float) for each in content):
        for position, value in enumerate(content):
            yield from _leaves(value, f"{key}.{position}")
    else:
        yield key, content


def _matches(key: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", r"[^.]+"), key) is not None


def _compared(file: str, key: str, before: Sequence[Any], now: Sequence[Any] | None, rule: str | float) -> Compared:
    if now is None:
        raise ValueError(f"{file}: {key} is recorded, but missing from the new results")
    if rule == "seeds":
        old, new = _flat(before), _flat(now)
        limit = spread_limit(old, len(new))
        means = statistics.fmean(old), statistics.fmean(new)
        moved = limit is not None and abs(means[0] - means[1]) > limit
        return Compared(file, key, *means, limit, moved, by_seeds=True)
    (old,), (new,) = before, now
    number = isinstance(old, int | float) and isinstance(new, int | float) and not isinstance(old, bool)
    if rule == "exactly" or not number:
        return Compared(file, key, old, new, 0.0, old != new)
    limit = float(rule) * abs(old)
    return Compared(file, key, old, new, limit, not math.isclose(old, new, rel_tol=0, abs_tol=limit))


def _flat(values: Sequence[Any]) -> list[float]:
    return [number for value in values for number in (value if isinstance(value, list) else [value])]


def spread_limit(recorded: Sequence[float], again: int) -> float | None:
    """Return how much the mean of new trainings may differ from that of the recorded ones, in 95% of all cases.

    Args:
        recorded: values of independent trainings, assumed to be normal.
        again: number of new trainings.

    Returns:
        t · s · sqrt(1/n + 1/m) with Student's t of n - 1 degrees of freedom; None for fewer than two values.
    """
    count = len(recorded)
    if count < 2:
        return None
    return t_quantile((1 + CONFIDENCE) / 2, count - 1) * statistics.stdev(recorded) * math.sqrt(1 / count + 1 / again)


def summary(name: str, failed: str | None, found: Sequence[Compared]) -> str:
    """Report what moved, and how much of it would move by chance."""
    if failed:
        return f"{name}: failed: {failed}"
    moved = [each for each in found if each.moved]
    lines = [f"  {each.file} {each.key}: {each.recorded} recorded, {each.again} now" for each in moved]
    random = sum(each.by_seeds and each.limit is not None for each in found)
    open_ = sum(each.limit is None for each in found)
    untold = f", {open_} from one training have no interval" if open_ else ""
    chance = f"; with intervals over seeds {1 - CONFIDENCE:.0%} move by chance" if random and moved else ""
    return "\n".join(
        [f"{name}: {len(moved)} of {len(found)} numbers moved beyond their limits{untold}{chance}", *lines]
    )


if __name__ == "__main__":
    main()
