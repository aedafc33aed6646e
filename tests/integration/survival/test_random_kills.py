"""Kills at random places in a run of three stages: resumed by the same command, it ends as if nothing had been."""

import itertools
import random
from collections import Counter

import pytest

pytestmark = pytest.mark.slow

STAGES = {
    "px16": {"resolution": 16, "samples": 40, "save_every": 16, "validate_every": 16},
    "px24": {"resolution": 24, "samples": 32, "batch_size": 16, "save_every": 16, "validate_every": 0},
    "px32": {"resolution": 32, "samples": 24, "batch_size": 12, "micro_batch_size": 1, "save_every": 12},
}
POSITIONS = {"px16": 40, "px24": 32, "px32": 24}
KINDS = {
    "data": ("data",),
    "step": ("forward", "backward", "optimizer"),
    "validation": ("validation begins", "validation", "validation ends"),
    "save": ("half written", "written, not synced", "written, not in place", "in place"),
    "hand-over": ("hand-over begins", "hand-over ends", "stage not marked", "stage marked", "export begins"),
}
SAVES_ON = 0  # the process that writes
HOWS = ("kill", "kill all", "term", "term all")


class Killer:
    """Kills attempts at a run at random points until it has been killed so often, then lets it end."""

    def __init__(self, server, seed, folder):
        self.server, self.random, self.folder = server, random.Random(seed), folder
        self.counts = Counter()
        self.attempts = []

    def run(self, toy, rank_counts, kills):
        """Interrupt `toy` so many times, each attempt on the next of the numbers of ranks; then finish it."""
        while self.counts.total() < kills and not (toy.folder / "final" / "model_index.json").exists():
            ranks = rank_counts[len(self.attempts) % len(rank_counts)]
            kind, die = self.choose(ranks)
            statuses = self.attempt(toy, ranks, die=die)
            if any(statuses):
                assert set(statuses) <= {0, 1, -9, -15, 143} and {143, -9} & set(statuses), self.told(die)
                self.counts[kind, die["how"]] += 1
        assert not any(self.attempt(toy, rank_counts[0])), self.told({})

    def choose(self, ranks):
        """A kind of point, and the fault that strikes there."""
        kind = self.random.choice(list(KINDS))
        point = self.random.choice(KINDS[kind])
        on = SAVES_ON if kind == "save" else self.random.randrange(ranks)
        often = {"data": 12, "step": 6, "validation": 3, "save": 2, "hand-over": 1}[kind]
        return kind, {"at": point, "nth": self.random.randint(1, often), "how": self.random.choice(HOWS), "on": on}

    def attempt(self, toy, ranks, **faults):
        """One start of the command, its positions noted in a folder of its own."""
        seen = self.folder / f"attempt{len(self.attempts):03d}"
        seen.mkdir(parents=True)
        self.attempts.append(seen)
        return self.server.run(toy, ranks, note_positions={"folder": str(seen)}, **faults)

    def told(self, die):
        """What to look at when a run went wrong."""
        return f"{die}: {self.server.log.read_text()}"


@pytest.mark.parametrize(("ranks", "kills"), [(1, 14), (2, 12)])
def test_the_same_ranks_end_with_the_same_bits(toy, server, same, trained_positions, tmp_path, ranks, kills):
    whole = toy("whole", STAGES)
    assert not any(server.run(whole, ranks))
    counts = Counter()
    for number in itertools.count():
        killer = Killer(server, seed=100 * ranks + number, folder=tmp_path / f"seen{number}")
        killed = toy(f"killed{number}", STAGES)
        killer.run(killed, [ranks], min(6, kills - counts.total()))
        counts += killer.counts
        for stage in (1, 2, 3):
            assert same(whole.end(stage), killed.end(stage)), (number, stage)
        check_plan(trained_positions(killer.attempts))
        if counts.total() >= kills:
            break
    print(f"{counts.total()} kills on {ranks} rank(s): {dict(counts)}")


def test_other_numbers_of_ranks_train_on_the_same_samples(toy, server, trained_positions, tmp_path):
    counts = Counter()
    for number in itertools.count():
        killer = Killer(server, seed=7 + number, folder=tmp_path / f"seen{number}")
        killer.run(toy(f"mixed{number}", STAGES), [2, 1, 4], kills=6)
        counts += killer.counts
        check_plan(trained_positions(killer.attempts))
        if counts.total() >= 8:
            break
    print(f"{counts.total()} kills on 1, 2 and 4 ranks: {dict(counts)}")


def check_plan(steps):
    """Every step trained on exactly its positions: together each position of the plan once."""
    assert steps.keys() == STAGES.keys()
    for name, positions in POSITIONS.items():
        batch = STAGES[name].get("batch_size", 8)
        expected = {k + 1: list(range(k * batch, (k + 1) * batch)) for k in range(positions // batch)}
        assert steps[name] == expected
