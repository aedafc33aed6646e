"""Pictures and metrics in loggers other than TensorBoard: each gets them in the form that it takes."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import MLFlowLogger
from PIL import Image

from hdm_lightning.errors import UserError
from hdm_lightning.training import job
from hdm_lightning.training.callbacks.images import log_image
from hdm_lightning.training.trackio_logger import TrackioLogger

STAND_IN = """
begun, logged = [], []

class Image:
    def __init__(self, value):
        self.value = value

class Run:
    def log(self, metrics, step=None):
        logged.append((metrics, step))

    def finish(self):
        logged.append("finished")

def init(**options):
    begun.append(options)
    return Run()
"""


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    """A module in trackio's place that notes what it is told."""
    (tmp_path / "trackio.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    import trackio

    yield trackio
    sys.modules.pop("trackio", None)


def test_trackio_gets_metrics_and_pictures_of_one_run_over_its_stages(trackio):
    logger, picture = TrackioLogger("hdm", "run", space_id="me/space"), Image.new("RGB", (4, 4))
    logger.log_metrics({"val/loss": 0.5}, step=32)
    log_image(SimpleNamespace(loggers=[logger]), "samples/4x4", picture, 64)
    logger.finalize("success")
    TrackioLogger("hdm", "run").log_metrics({"val/loss": 0.25}, step=96)
    first = {"project": "hdm", "name": "run", "resume": "allow"}
    assert trackio.begun == [{**first, "space_id": "me/space"}, first]
    metrics, (shown, step), end, later = trackio.logged
    assert metrics == ({"val/loss": 0.5}, 32) and later == ({"val/loss": 0.25}, 96) and end == "finished"
    assert shown["samples/4x4"].value is picture and step == 64


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("hdm_lightning.training.trackio_logger.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install trackio"):
        TrackioLogger("hdm")


def test_mlflow_gets_pictures_by_its_client(monkeypatch):
    told = []
    client = SimpleNamespace(log_image=lambda run_id, image, **named: told.append((run_id, image, named)))
    logger = MLFlowLogger.__new__(MLFlowLogger)
    monkeypatch.setattr(MLFlowLogger, "experiment", client)
    monkeypatch.setattr(MLFlowLogger, "run_id", "id")
    log_image(SimpleNamespace(loggers=[logger]), "samples/4x4", Image.new("RGB", (4, 4), (1, 2, 3)), 64)
    ((run_id, image, named),) = told
    assert run_id == "id" and named == {"key": "samples/4x4", "step": 64}
    assert np.array_equal(image, np.full((4, 4, 3), (1, 2, 3), dtype=np.uint8))


def test_a_logger_that_lacks_its_package_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(job, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"logger\.wandb: needs the package wandb"):
        job._require_package("lightning.pytorch.loggers.WandbLogger", "logger.wandb")
    job._require_package("lightning.pytorch.loggers.CSVLogger", "logger.csv")
