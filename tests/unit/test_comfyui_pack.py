"""The nodes for ComfyUI, as far as they can be looked at without ComfyUI: requirements, examples, packaging."""

import ast
import importlib.util
import json
import sys
import tomllib
from types import ModuleType

import pytest
from PIL import Image

from drawing_workflow import without_dates
from hdm_lightning.version import __version__
from real_comfyui import FOLDER, PACK, UNSET, started

WORKFLOWS = PACK / "workflows"
NAMES = sorted(file.name.removesuffix(".api.json") for file in WORKFLOWS.glob("*.api.json"))
FOREIGN = {"comfy", "comfyui_version", "folder_paths", "node_helpers"}
"""Of ComfyUI; nothing of it is copied here."""


@pytest.fixture
def requirements():
    spec = importlib.util.spec_from_file_location("requirements_met", PACK / "requirements_met.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def comfyui_of(monkeypatch, requirements):
    """Function of a version and of what is missing that stands a ComfyUI in."""

    def stand_in(version, lacking=()):
        for name, attributes in requirements.NEEDED.items():
            module = ModuleType(name)
            for attribute in attributes:
                if f"{name}.{attribute}" not in lacking:
                    setattr(module, attribute, object())
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
        stated = ModuleType("comfyui_version")
        stated.__version__ = version
        monkeypatch.setitem(sys.modules, "comfyui_version", stated)

    return stand_in


def test_a_comfyui_with_all_that_is_needed_is_taken(requirements, comfyui_of, caplog):
    comfyui_of("0.3.64")
    requirements.require_comfyui()
    comfyui_of("0.10.2")
    requirements.require_comfyui()
    assert not caplog.records
    comfyui_of("0.3.9")
    requirements.require_comfyui()
    assert "ComfyUI 0.3.9 is older than 0.3.64" in caplog.text


def test_a_comfyui_that_is_too_old_is_refused_with_the_oldest_tried(requirements, comfyui_of):
    comfyui_of("0.2.7", lacking=["comfy.patcher_extension.WrappersMP"])
    with pytest.raises(ImportError) as told:
        requirements.require_comfyui()
    for words in ("0.2.7", "comfy.patcher_extension.WrappersMP", "0.3.64"):
        assert words in str(told.value)


def test_the_pack_is_packaged_as_the_registry_wants_it(requirements):
    stated = tomllib.loads((PACK / "pyproject.toml").read_text())
    oldest = ".".join(map(str, requirements.OLDEST_TRIED))
    assert stated["tool"]["comfy"]["requires-comfyui"] == f">={oldest}"
    assert stated["project"]["version"] == __version__
    assert (PACK / "requirements.txt").read_text().split() == stated["project"]["dependencies"]
    assert (PACK / "LICENSE").read_text() == (PACK.parents[1] / "LICENSE").read_text()


def test_the_nodes_import_the_package_and_comfyui_and_nothing_else():
    imported = set()
    for file in PACK.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == FOREIGN - {"comfyui_version"} | {"hdm_lightning", "torch"}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_the_same_as_graph_page_and_picture(name):
    graph = json.loads((WORKFLOWS / f"{name}.api.json").read_text())
    page = json.loads((WORKFLOWS / f"{name}.json").read_text())
    with Image.open(WORKFLOWS / f"{name}.png") as picture:
        assert without_dates(json.loads(picture.info["prompt"])) == graph
        assert json.loads(picture.info["workflow"]) == page
    assert {str(node["id"]): node["type"] for node in page["nodes"]} == {k: n["class_type"] for k, n in graph.items()}
    links = {number: (str(source), slot) for number, source, slot, *_ in page["links"]}
    for node in page["nodes"]:
        wired = {put["name"]: list(links[put["link"]]) for put in node["inputs"] if put["link"] is not None}
        inputs = graph[str(node["id"])]["inputs"]
        assert wired == {key: value for key, value in inputs.items() if isinstance(value, list)}
        typed = [value for value in inputs.values() if not isinstance(value, list)]
        assert all(value in node["widgets_values"] for value in typed)


def test_without_comfyui_the_tier_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(LookupError) as told:
        started(tmp_path)
    assert str(told.value) == UNSET and "make test-comfyui" in UNSET
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(LookupError, match=r"holds no main\.py"):
        started(tmp_path)
