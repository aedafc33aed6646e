"""Rows of a sweep read from folders written by hand: objective, order, baseline, seeds, what failed."""

import gc
import json
import math
import weakref

import pytest
import yaml

from hdm_lightning.cli import hydra_app
from hdm_lightning.cli.sweep import JobFailed
from hdm_lightning.errors import UserError
from hdm_lightning.training.sweep_results import (
    chart_png,
    objective,
    overridden_keys,
    read_results,
    settings_of,
    table_csv,
    table_markdown,
)

BASE = {"optimizer": "adamw", "rate": 0.5, "deep": True, "data.train": "x"}


def job(folder, overrides, validation=None, hours=(), error=None):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    if validation is not None:
        for stage, scale in (("01-a", 2.0), ("02-b", 1.0)):  # the last stage counts
            (folder / stage).mkdir()
            found = {name: scale * value for name, value in validation.items()}
            (folder / stage / "done.json").write_text(json.dumps({"validation": found}))
        (folder / "final").mkdir()
        for name in ("README.md", "model_index.json"):
            (folder / "final" / name).touch()
    lines = [json.dumps({"event": "progress", "device_hours": h, "cost_usd": 2 * h}) for h in hours]
    (folder / "ledger.jsonl").write_text("\n".join(lines))
    if error:
        (folder / "failed.json").write_text(json.dumps({"error": error, "trace": "…"}))


@pytest.fixture
def sweep(tmp_path):
    common = ["data.train=x"]
    job(tmp_path / "a", [*common, "optimizer=adamw", "seed=0"], {"raw": 0.30, "ema_1k": 0.20, "ema_9k": 0.1}, [1, 0.5])
    job(tmp_path / "b", [*common, "optimizer=adamw", "seed=1"], {"raw": 0.30, "ema_1k": 0.24, "ema_9k": 0.1}, [1])
    job(tmp_path / "c", [*common, "optimizer=muon", "seed=0"], {"raw": 0.25, "ema_1k": 0.18, "ema_9k": 0.4})
    job(tmp_path / "d", [*common, "optimizer=muon", "seed=1"], error="ValueError: a | b")
    job(tmp_path / "e", [*common, "optimizer=muon", "seed=2"])
    return tmp_path


def test_rows_are_sorted_by_the_exported_average_s_loss(sweep):
    results = read_results(sweep, BASE)
    assert [(r.folder.name, r.status, r.objective) for r in results] == [
        ("c", "done", 0.18),
        ("a", "done", 0.20),
        ("b", "done", 0.24),
        ("d", "failed", None),
        ("e", "unfinished", None),
    ]
    assert [r.baseline for r in results] == [False, True, True, False, False]
    assert (results[1].device_hours, results[1].cost_usd) == (1.5, 3.0)
    assert overridden_keys(sweep) == ["data.train", "optimizer", "seed"]


def test_seeds_are_gathered(sweep):
    best, second = settings_of(read_results(sweep, BASE))
    assert (best.name, best.values, best.baseline) == ("optimizer=muon", (0.18,), False)
    assert math.isnan(best.deviation)
    assert (second.name, second.baseline) == ("optimizer=adamw", True)
    assert second.mean == pytest.approx(0.22)
    assert second.deviation == pytest.approx(0.04 / 2**0.5)


def test_tables_and_picture(sweep):
    results = read_results(sweep, BASE)
    lines = table_csv(results).splitlines()
    assert lines[0].split(",")[:7] == ["job", "status", "baseline", "objective", "data.train", "optimizer", "seed"]
    assert lines[1].startswith("c,done,,0.18,x,muon,0,0.18,0.4,0.25")
    told = table_markdown("name", results, settings_of(results))
    assert "3 of 5 jobs done" in told
    assert "| optimizer=adamw **(baseline)** | 2 | 0.22 | 0.028 |" in told
    assert "| d | failed: ValueError: a \\| b |  |" in told
    picture = chart_png(settings_of(results))
    assert picture is not None and picture.startswith(b"\x89PNG")
    assert chart_png([]) is None


@pytest.mark.parametrize(
    ("override", "is_baseline"), [("rate=0.50", True), ("rate=0.25", False), ("deep=true", True), ("deep=false", False)]
)
def test_a_value_spelt_otherwise_is_the_baseline_s_too(tmp_path, override, is_baseline):
    job(tmp_path / "a", [override], {"raw": 1.0})
    job(tmp_path / "b", [override.split("=")[0] + "=7"], {"raw": 1.0})
    found = {r.folder.name: r.baseline for r in read_results(tmp_path, BASE)}
    assert found == {"a": is_baseline, "b": False}


@pytest.mark.parametrize(
    ("text", "value"),
    [("a: b", "a: b"), ("@x", "@x"), ("%a", "%a"), ("*b", "*b"), ("'it s'", "it s"), ("{a:1}", {"a": 1}), ("[[", "[[")],
)
def test_a_value_is_read_as_hydra_reads_it(tmp_path, text, value):
    job(tmp_path / "a", [f"key={text}"], {"raw": 1.0})
    job(tmp_path / "b", ["key=7"], {"raw": 1.0})
    for base, expected in ((value, True), ("other", False)):
        found = {r.folder.name: r.baseline for r in read_results(tmp_path, {"key": base})}
        assert found == {"a": expected, "b": False}


def test_the_objective_of_other_jobs(tmp_path):
    assert objective(tmp_path) is None
    job(tmp_path / "raw", [], {"raw": 0.3})
    assert objective(tmp_path / "raw") == 0.3
    (tmp_path / "vae" / "01-vae").mkdir(parents=True)
    measures = {"equivariance/x": 0.9, "reconstruction/l1": 0.04}
    (tmp_path / "vae" / "01-vae" / "done.json").write_text(json.dumps({"measures": measures}))
    assert objective(tmp_path / "vae") == 0.04


def test_a_failing_job_is_noted_and_lets_go_of_what_it_held(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hydra_app, "in_sweep", lambda: True)
    monkeypatch.setattr(hydra_app, "output_dir", lambda: str(tmp_path))

    class Held:
        """What a job has in memory."""

    held = []

    @hydra_app.JobErrors()
    def fail():
        memory = Held()
        held.append(weakref.ref(memory))
        try:
            raise ValueError("inner")
        except ValueError as error:
            raise UserError(f"no {1000}", where="a.b", hint="do c") from error

    with pytest.raises(JobFailed) as caught:
        fail()
    gc.collect()
    assert "hint: do c" in capsys.readouterr().err
    assert json.loads((tmp_path / "failed.json").read_text())["error"] == "a.b: no 1000"
    assert caught.value is not None and held[0]() is None
    assert hydra_app.JobErrors()(lambda: 0.5)() == 0.5
    assert not (tmp_path / "failed.json").exists()
