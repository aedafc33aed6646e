"""Nodes for the content of an image: the prompt, the camera, the empty latent."""

import logging
from typing import Any

import comfy.model_management
import node_helpers
import torch

from hdm_lightning.errors import UserError

from .loaders import CATEGORY
from .model import CAMERA, facts_of
from .text_encoder import TextClip

LARGEST = 16384
"""Maximum pixels along one side, as in ComfyUI's own nodes."""


class TextEncode:
    """HDM Text Encode: like CLIPTextEncode, but also reports how much of a long prompt was cut."""

    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES, RETURN_NAMES = ("CONDITIONING", "STRING"), ("conditioning", "notice")
    DESCRIPTION = "Encodes a prompt as hdm-sample does. The notice says how much was cut, and is empty if nothing was."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI shows them."""
        return {"required": {"clip": ("CLIP",), "text": ("STRING", {"multiline": True, "dynamicPrompts": True})}}

    def encode(self, clip: Any, text: str) -> dict[str, Any]:
        """Return the conditioning and the notice, which the page shows and the history keeps."""
        if not isinstance(clip, TextClip):
            what = f"is a {type(clip).__name__}, not the text encoder of a model of hdm-lightning"
            raise UserError(what, where="clip", hint="connect the CLIP of HDM Load Model")
        notice = clip.cut_off(text) or ""
        result = (clip.encode_from_tokens_scheduled(clip.tokenize(text)), notice)
        return {"ui": {"text": [notice] if notice else []}, "result": result}


class Camera:
    """HDM Camera: moves the camera to the side, up or down, or closer."""

    CATEGORY, FUNCTION = CATEGORY, "move"
    RETURN_TYPES, RETURN_NAMES = ("CONDITIONING", "CONDITIONING"), ("positive", "negative")
    DESCRIPTION = "Moves the camera right, down and in; 1 is half the side of a square image. Connect both prompts."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI shows them."""
        shift = {"default": 0.0, "min": -4.0, "max": 4.0, "step": 0.05}
        return {
            "required": {
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "x_shift": ("FLOAT", shift),
                "y_shift": ("FLOAT", shift),
                "zoom": ("FLOAT", {"default": 1.0, "min": 0.1, "max": 10.0, "step": 0.05}),
            }
        }

    def move(self, positive: Any, negative: Any, x_shift: float, y_shift: float, zoom: float) -> tuple[Any, Any]:
        """Return changed copies of both conditionings, as ComfyUI reuses the originals in the next run."""
        camera = {CAMERA: (x_shift, y_shift, zoom)}
        moved = [node_helpers.conditioning_set_values(each, camera) for each in (positive, negative)]
        return moved[0], moved[1]


class EmptyLatent:
    """HDM Empty Latent: has the model's channels and a size that fits the model."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES = ("LATENT",)
    DESCRIPTION = "An empty latent with the model's channels. If a size does not fit, the error names the nearest."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI shows them."""
        side = {"default": 512, "min": 8, "max": LARGEST, "step": 1}
        return {
            "required": {
                "model": ("MODEL",),
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
            }
        }

    def make(self, model: Any, width: int, height: int, batch_size: int) -> tuple[dict[str, Any]]:
        """Return zeros (batch_size, C, height/f, width/f)."""
        facts = facts_of(model)
        if width % facts.multiple or height % facts.multiple:
            near = "x".join(str(max(1, round(side / facts.multiple)) * facts.multiple) for side in (width, height))
            what = f"both sides of {width}x{height} must be multiples of {facts.multiple}"
            raise UserError(what, where="width, height", hint=f"use {near}")
        usual = facts.sampling.get("width"), facts.sampling.get("height")
        if all(usual) and usual != (width, height):
            logging.info(f"hdm-lightning: this model was trained for {usual[0]}x{usual[1]}")
        shape = (batch_size, facts.channels, height // facts.factor, width // facts.factor)
        return ({"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())},)
