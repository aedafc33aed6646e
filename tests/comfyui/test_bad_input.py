"""What a user gets wrong in ComfyUI: each time a message with what was found and what would fit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from drawing_workflow import drawing, node, with_model
from hdm_lightning.interop.adapter_files import read_adapter, write_adapter_folder
from real_comfyui import WorkflowError

pytestmark = pytest.mark.comfyui


def refused(comfyui, graph):
    """What ComfyUI shows of a workflow that fails."""
    with pytest.raises(WorkflowError) as told:
        comfyui.run(graph)
    return str(told.value)


def loading(**inputs):
    return {"model": node("HDMLoadModel", **inputs), "out": node("PreviewAny", source=["model", 0])}


def test_a_model_of_another_kind(comfyui, run, tmp_path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}, tmp_path / "unet.safetensors")
    told = refused(comfyui, loading(name="(by path)", path=str(tmp_path / "unet.safetensors")))
    assert "unet.safetensors: no tensor belongs to an XUT" in told
    told = refused(comfyui, loading(name="(by path)", path=str(tmp_path / "nothing")))
    assert "nothing: there is no such file or folder" in told
    assert "put the file or folder into models/hdm" in refused(comfyui, loading(name="(by path)"))


def test_a_lora_in_the_place_of_a_model_and_of_another_base(comfyui, run, lora, tmp_path, saved):
    told = refused(comfyui, loading(name="(by path)", path=str(lora)))
    assert "is a LoRA, not a whole model" in told and "HDM Load LoRA" in told
    other = saved(tmp_path / "other", seed=1)
    graph = drawing("(by path)")
    graph["model"]["inputs"]["path"] = str(other)
    graph = with_model(graph, node("HDMLoadLora", model=["model", 0], name="ink", weight=1.0))
    assert "was trained on another base" in refused(comfyui, graph)
    graph["changed"]["inputs"]["any_base"] = True
    assert comfyui.run(graph)["saved"]["images"]
    adapter = read_adapter(lora)
    layers = {f"elsewhere.{name}": layer for name, layer in adapter.layers.items()}
    write_adapter_folder(tmp_path / "strange", type(adapter)(layers))
    graph["changed"]["inputs"] |= {"name": "(by path)", "path": str(tmp_path / "strange")}
    assert "was made for another network: this one has no layer elsewhere." in refused(comfyui, graph)


def test_a_text_encoder_that_is_not_here_is_named_with_how_to_get_it(comfyui, run, tmp_path, tiny_text_encoder):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    index = moved / "final" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder_name": "Some/Encoder-1B"}))
    told = refused(comfyui, loading(name="(by path)", path=str(moved)))
    for words in ("Some/Encoder-1B", "hf download Some/Encoder-1B", "models/text_encoders"):
        assert words in told
    shutil.copytree(tiny_text_encoder, comfyui.folder / "models" / "text_encoders" / "tiny")
    assert comfyui.run(loading(name="(by path)", path=str(moved), text_encoder="tiny"))


def test_sizes_that_do_not_fit(comfyui, run):
    told = refused(comfyui, drawing("run", width=100, height=60))
    assert "both sides of 100x60 must be multiples of 8" in told and "use 96x64" in told
    graph = drawing("run")
    graph["latent"] = node("EmptySD3LatentImage", width=80, height=72, batch_size=1)
    told = refused(comfyui, graph | {"latent": node("EmptyLatentImage", width=72, height=64, batch_size=1)})
    assert "both sides of a 36x32 image must be multiples of 8" in told and "use 32x32" in told


def test_a_prompt_that_is_longer_than_the_context(comfyui, run):
    graph = drawing("run")
    graph["prompt"] = node("HDMTextEncode", clip=["model", 1], text="a red circle " * 6)
    graph["told"] = node("PreviewAny", source=["prompt", 1])
    outputs = comfyui.run(graph)
    (told,) = outputs["prompt"]["text"]
    assert "has 18 tokens, but the model reads 12: the last 6 are cut" in told
    assert told in json.dumps(outputs["told"], ensure_ascii=False)
    assert told in comfyui.log.read_text()
    graph["prompt"]["inputs"]["text"] = "a red circle"
    assert not comfyui.run(graph)["prompt"]["text"]


def test_other_kinds_of_parts_are_refused(comfyui, run):
    graph = drawing("run")
    graph["clip"] = node("CLIPSetLastLayer", clip=["model", 1], stop_at_clip_layer=-2)
    graph["prompt"]["inputs"]["clip"] = ["clip", 0]
    assert "records which" in refused(comfyui, graph)


def test_a_shift_of_times_by_a_node_for_another_kind(comfyui, run):
    shifted = node("ModelSamplingSD3", model=["model", 0], shift=2.0)
    told = refused(comfyui, with_model(drawing("run"), shifted))
    assert "times go up to 1000 instead of 1" in told and "ModelSamplingAuraFlow" in told
    shifted = node("ModelSamplingAuraFlow", model=["model", 0], shift=2.0)
    assert comfyui.run(with_model(drawing("run"), shifted))["saved"]["images"]
