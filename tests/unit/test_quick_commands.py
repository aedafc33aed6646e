"""Help and version come without the libraries that they have no use for; mistyped keys are met with the nearest."""

import ast
import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hdm_lightning.cli.overrides import USUAL, hint_for, nearest_key
from hdm_lightning.version import __version__

SETUP = configparser.ConfigParser()
SETUP.read(Path(__file__).parents[2] / "setup.cfg")
COMMANDS = dict(line.split(" = ") for line in SETUP["options.entry_points"]["console_scripts"].strip().splitlines())
SLOW = {"torch", "lightning", "transformers", "diffusers", "torchmetrics", "webdataset", "numpy", "matplotlib"}
SLOW |= {"gradio", "PIL", "simplejpeg", "sympy"}


def told(command, *words):
    """What a command prints, its exit status, and the slow libraries that it has loaded."""
    module, _, function = COMMANDS[command].partition(":")
    program = (
        f"import sys; sys.argv = {[command, *words]!r}\n"
        f"from {module} import {function} as main\n"
        "status = 0\n"
        "try: status = main()\n"
        "except SystemExit as end: status = end.code\n"
        f"print(); print((status or 0, sorted({SLOW} & set(sys.modules))))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    text, _, last = run.stdout.rstrip().rpartition("\n")
    return text.strip(), *ast.literal_eval(last)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_version_load_nothing_slow(command):
    text, status, loaded = told(command, "--help")
    assert command in text and (status, loaded) == (0, [])
    module = COMMANDS[command].partition(":")[0]
    line = [sys.executable, "-X", "importtime", "-m", module, "--version"]
    run = subprocess.run(line, capture_output=True, text=True, check=True, timeout=300)
    loaded = {each.rpartition("|")[2].strip() for each in run.stderr.splitlines()}
    assert run.stdout == f"hdm-lightning {__version__}\n" and not loaded & SLOW and "hdm_lightning" in loaded


def test_a_forecast_loads_no_more_than_torch():
    """The costs of frozen encoders are formulas; a schedule is planned without the libraries that would train it."""
    text, status, loaded = told("hdm-plan", "gpus=1x4090")
    assert "total rent" in text and (status, loaded) == (0, ["numpy", "torch"])


def test_keys_are_explained_from_source_text():
    _, status, loaded = told("hdm-train", "--explain", "trainer", "model", "callbacks")
    assert (status, loaded) == (0, [])


@pytest.mark.parametrize("task", ["stats", "index", "verify"])
def test_shards_are_looked_through_without_torch(tiny_shards, tmp_path, task):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    text, status, loaded = told("hdm-shards", task, str(tmp_path / "shards"))
    assert text and status == 0 and not {"torch", "matplotlib", "webdataset"} & set(loaded)


@pytest.mark.parametrize("model", ["runs/mistyped", "mistyped", "./OWNER/NAME"])
def test_a_model_that_is_not_there_is_told_before_anything_slow_is_loaded(model):
    _, status, loaded = told("hdm-sample", model, "a star")
    assert (status, loaded) == (2, [])


@pytest.mark.parametrize("command", COMMANDS)
def test_windows_is_refused_in_the_first_line(command):
    """As there: no fcntl and resource, no SIGUSR1, no poll; nothing is imported that needs them."""
    module, _, function = COMMANDS[command].partition(":")
    program = (
        "import select, signal, sys\n"
        "sys.platform = 'win32'; sys.modules |= {'fcntl': None, 'resource': None}\n"
        "del signal.SIGUSR1, select.poll\n"
        f"sys.argv = [{command!r}, 'shards']\n"
        f"from {module} import {function} as main\n"
        "sys.exit(main())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: system: ") and "WSL2" in run.stderr and "Traceback" not in run.stderr


def test_the_nearest_key_is_found_part_by_part():
    config = OmegaConf.create({"data": {"train": "???", "crop": {"flip": False}}, "model": {"width": 1}})
    assert nearest_key("data.trian", config) == "data.train"
    assert nearest_key("dta.crop.flp", config) == "data.crop.flip"
    assert (
        nearest_key("modle.width", OmegaConf.create({"module": {"width": 1}, "model": {"width": 1}})) == "model.width"
    )
    assert nearest_key("data.crop.qqqq", config) is None and nearest_key("model.width.deep", config) is None


def test_hints_for_what_hydra_complains_of():
    assert hint_for("Could not override 'schedule.stages.px257.samples'.", "train").startswith(
        "did you mean schedule.stages.px256.samples?"
    )
    message = "In 'train': Could not find 'model/xut_bas'\n\nAvailable options in 'model':\n\tpublished\n\txut_base\n"
    assert hint_for(message, "train") == "did you mean model=xut_base?"
    assert "'data.captions.kinds={a: {b: VALUE}}'" in hint_for("Could not override 'data.captions.kinds.a.b'.", "train")
    assert hint_for("something else", "train") == USUAL
