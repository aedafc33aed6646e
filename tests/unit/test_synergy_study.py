"""The design of experiments/synergy, what its least squares find, and jobs that go on where they stopped."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.study_jobs import run_jobs
from experiments.synergy import analyze, design, effects


def test_the_design_holds_every_main_effect_and_two_way_interaction() -> None:
    planned = list(design.planned())
    matrix = design.model_matrix(planned)
    assert len({each.name for each in planned}) == len(planned) == 72
    assert matrix.shape == (72, 6 + 24)
    assert np.linalg.matrix_rank(matrix) == 30
    # The precision of every column beside that of an orthogonal design of as many trainings.
    precision = 1 / (72 * np.diag(np.linalg.inv(matrix.T @ matrix))[6:])
    assert precision.min() > 0.8


def test_a_seed_has_24_different_cells_in_two_blocks_and_every_cell_comes_up() -> None:
    planned = design.planned()
    for seed in range(3):
        mine = [each for each in planned if each.seed == seed]
        assert len({each.cell for each in mine}) == len(mine) == 24
    assert set(Counter(each.block for each in planned).values()) == {12}
    assert {each.cell for each in planned} == set(design.all_cells())


def truth(each: design.Planned) -> float:
    """A response with blocks, main effects and one interaction."""
    cell = each.cell
    return (
        0.3 * each.block
        + {"mirrored": -1.0, "last": -0.4, "none": 0.0, "concatenation": 0.2}[cell.skips]
        + (0.5 if cell.routing == "0.5" else 0.0)
        - (0.7 if cell.eq == "on" else 0.0)
        + (0.25 if cell.eq == "on" and cell.crop == "buckets" else 0.0)
    )


def test_effects_and_interactions_come_out_as_they_went_in() -> None:
    planned = list(design.planned())
    random = np.random.default_rng(0)
    noise = random.normal(0, 1e-4, len(planned))
    fit = effects.Fit.of(planned, np.array([truth(each) for each in planned]) + noise)
    main = {each.name: each.value for each in effects.main_effects(fit)}
    assert main["skips: mirrored against none"] == pytest.approx(-1.0, abs=1e-3)
    assert main["skips: mirrored against last"] == pytest.approx(-0.6, abs=1e-3)
    assert main["routing: 0.5 against 0"] == pytest.approx(0.5, abs=1e-3)
    assert main["eq: on against off"] == pytest.approx(-0.7 + 0.25 / 3, abs=1e-3)
    assert main["crop: buckets against center"] == pytest.approx(0.125, abs=1e-3)
    crossed = {each.name: each.value for each in effects.interactions(fit)}
    assert crossed.pop("eq on × crop buckets") == pytest.approx(0.25, abs=1e-3)
    assert max(map(abs, crossed.values())) < 1e-3
    over = effects.over_autoencoders(fit)
    assert over is not None
    assert over.value == pytest.approx(-0.7 + 0.25 / 3, abs=1e-3)
    assert fit.term_p("eq:crop") < 1e-6


def test_intervals_and_tests_keep_their_level_where_there_is_nothing() -> None:
    """Of 200 sets of noise 5% of the intervals leave zero out, and of the tests of each term are below 0.05."""
    planned, random = list(design.planned()), np.random.default_rng(1)
    outside, small, count = [], [], 200
    for _ in range(count):
        fit = effects.Fit.of(planned, random.normal(0, 1, len(planned)))
        outside += [each.low > 0 or each.high < 0 for each in effects.main_effects(fit)[:4]]
        small += [fit.term_p(term) < 0.05 for term in ("skips", "skips:crop")]
    assert 0.03 < np.mean(outside) < 0.075
    assert 0.025 < np.mean(small) < 0.08


def test_what_some_of_the_trainings_do_not_say_is_left_out() -> None:
    one_block = [each for each in design.planned() if each.block == 0]
    fit = effects.Fit.of(one_block, np.zeros(len(one_block)))
    assert effects.main_effects(fit) == []
    assert all(fit.term_p(term) is None for term in effects.PRIMARY_TERMS)
    most = [each for each in design.planned() if each.cell.skips != "concatenation"]
    names = [each.name for each in effects.main_effects(effects.Fit.of(most, np.arange(len(most)) % 5 * 1.0))]
    assert "skips: concatenation against none" not in names


def test_contrasts_are_orthogonal_and_of_unit_mean_square() -> None:
    for levels in (2, 3, 4):
        columns = design.contrasts(levels)
        assert columns.T @ columns == pytest.approx(levels * np.eye(levels - 1))
        assert columns.sum(axis=0) == pytest.approx(0)
    full = np.column_stack(list(design.terms(design.all_cells()).values()))
    assert full.T @ full == pytest.approx(48 * np.eye(24))
    assert len(list(itertools.product(*design.FACTORS.values()))) == 48


def test_the_page_says_what_its_results_say() -> None:
    folder = Path(analyze.__file__).parent
    found = analyze.analyze(analyze.read(folder / "results"))
    assert analyze.tables(found) in (folder / "README.md").read_text(encoding="utf-8")


def test_jobs_go_on_where_they_stopped(tmp_path) -> None:
    tried = []

    def job(name: str, fails: bool = False):
        tried.append(name)
        (tmp_path / "scratch" / name).mkdir(parents=True, exist_ok=True)
        if fails:
            raise RuntimeError("the disk is on fire")
        return {"value": len(tried)}

    jobs = {"a": lambda: job("a"), "b": lambda: job("b", fails=True), "c": lambda: job("c")}
    run_jobs(jobs, tmp_path / "results", scratch=tmp_path / "scratch")
    assert tried == ["a", "b", "c"]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["a.json", "c.json"]
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["b"]
    run_jobs({**jobs, "b": lambda: job("b")}, tmp_path / "results", scratch=tmp_path / "scratch")
    assert tried == ["a", "b", "c", "b"]
    found = json.loads((tmp_path / "results" / "b.json").read_text())
    assert found["job"] == "b"
    assert found["value"] == 4
    assert {"commit", "processor", "torch", "wall_seconds"} <= set(found["made"])
