"""The example workflows, run as they are but for the model's name."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from drawing_workflow import without_dates
from real_comfyui import PACK

pytestmark = pytest.mark.comfyui
WORKFLOWS = sorted((PACK / "workflows").glob("*.api.json"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_runs(comfyui, run, lora, file):
    shutil.copy(PACK / "workflows" / "start.png", comfyui.folder / "input")
    graph = json.loads(file.read_text())
    loaders = [node["inputs"] for node in graph.values() if node["class_type"] == "HDMLoadModel"]
    assert [inputs["name"] for inputs in loaders] == ["demo"]
    loaders[0]["name"] = "run"
    (picture,) = comfyui.pictures(comfyui.run(graph, extra_pnginfo={"workflow": {"nodes": []}}))
    with Image.open(picture) as saved:
        assert saved.size == (64, 64) and np.asarray(saved).std() > 1
        assert without_dates(json.loads(saved.info["prompt"])) == graph


def test_the_server_knows_every_node_with_a_name_to_show(comfyui):
    known = comfyui.get("object_info")
    ours = {name: node for name, node in known.items() if node["category"] == "hdm-lightning"}
    used = {node["class_type"] for file in WORKFLOWS for node in json.loads(file.read_text()).values()}
    assert {name for name in used if name.startswith("HDM")} <= set(ours)
    assert all(node["display_name"].startswith("HDM ") and node["description"] for node in ours.values())
