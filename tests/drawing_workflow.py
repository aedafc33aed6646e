"""Workflows in ComfyUI's API form, put together from a plain one by what a test changes."""

from typing import Any

Graph = dict[str, Any]
SEED = 7


def drawing(
    name: str, *, prompt: str = "a red circle", negative: str = "", width: int = 64, height: int = 64, **how: Any
) -> Graph:
    """Loader, two prompts, latent, KSampler (euler, simple), decoded, rounded and saved.

    Args:
        name: the model's, as the loader lists it.
        prompt, negative: texts.
        width, height: in pixels.
        how: inputs of KSampler to change.
    """
    sampler = {
        "model": ["model", 0],
        "positive": ["prompt", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
        "seed": SEED,
        "steps": 10,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        **how,
    }
    latent = {"model": ["model", 0], "width": width, "height": height, "batch_size": 1}
    return {
        "model": node("HDMLoadModel", name=name),
        "prompt": node("CLIPTextEncode", clip=["model", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["model", 1], text=negative),
        "latent": node("HDMEmptyLatent", **latent),
        "sampler": node("KSampler", **sampler),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "rounded": node("HDMRoundPixels", image=["decoded", 0]),
        "saved": node("SaveImage", images=["rounded", 0], filename_prefix="drawn"),
    }


def node(kind: str, **inputs: Any) -> Graph:
    """A node of a class with its inputs: values, or [node, output]."""
    return {"class_type": kind, "inputs": inputs}


def with_camera(graph: Graph, x_shift: float, y_shift: float, zoom: float) -> Graph:
    """The same, seen by another camera."""
    camera = {"positive": ["prompt", 0], "negative": ["negative", 0], "x_shift": x_shift, "y_shift": y_shift}
    inputs = {**graph["sampler"]["inputs"], "positive": ["camera", 0], "negative": ["camera", 1]}
    return {**graph, "camera": node("HDMCamera", **camera, zoom=zoom), "sampler": node("KSampler", **inputs)}


def with_model(graph: Graph, changed: Graph) -> Graph:
    """The same with a node between the loader and the sampler."""
    inputs = {**graph["sampler"]["inputs"], "model": ["changed", 0]}
    return {**graph, "changed": changed, "sampler": node("KSampler", **inputs)}


def by_solver(graph: Graph, solver: str, steps: int, shift: float = 0.0, strength: float = 1.0) -> Graph:
    """The same with a solver and times of this project in place of KSampler; shift 0 is the model's own."""
    known = graph["sampler"]["inputs"]
    inputs = {key: known[key] for key in ("model", "positive", "negative", "latent_image", "cfg")}
    inputs |= {"noise_seed": known["seed"], "add_noise": True, "sampler": ["solver", 0], "sigmas": ["times", 0]}
    return {
        **graph,
        "solver": node("HDMSolver", solver=solver),
        "times": node("HDMTimes", model=["model", 0], steps=steps, shift=shift, strength=strength),
        "sampler": node("SamplerCustom", **inputs),
    }


def without_dates(graph: Graph) -> Graph:
    """A workflow as it was sent: in pictures ComfyUI adds what a node said of changes of its files."""
    return {key: {part: node[part] for part in ("class_type", "inputs")} for key, node in graph.items()}
