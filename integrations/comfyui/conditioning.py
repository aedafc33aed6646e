"""Nodes for what is drawn: the prompt, the camera, the empty latent."""

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
"""Pixels along one side, as ComfyUI's own nodes have it."""


class TextEncode:
    """HDM Text Encode: as CLIPTextEncode, and tells what of a long prompt was cut."""

    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES, RETURN_NAMES = ("CONDITIONING", "STRING"), ("conditioning", "notice")
    DESCRIPTION = "Encodes a prompt as hdm-sample does. The notice says what was cut; it is empty where nothing was."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows."""
        return {"required": {"clip": ("CLIP",), "text": ("STRING", {"multiline": True, "dynamicPrompts": True})}}

    def encode(self, clip: Any, text: str) -> dict[str, Any]:
        """The conditioning, and the notice, which the page shows and the history keeps."""
        if not isinstance(clip, TextClip):
            what = f"is a {type(clip).__name__}, not the text encoder of a model of hdm-lightning"
            raise UserError(what, where="clip", hint="connect the CLIP of HDM Load Model")
        notice = clip.cut_off(text) or ""
        result = (clip.encode_from_tokens_scheduled(clip.tokenize(text)), notice)
        return {"ui": {"text": [notice] if notice else []}, "result": result}


class Camera:
    """HDM Camera: moves what is seen to the side, up or down, or closer."""

    CATEGORY, FUNCTION = CATEGORY, "move"
    RETURN_TYPES, RETURN_NAMES = ("CONDITIONING", "CONDITIONING"), ("positive", "negative")
    DESCRIPTION = "Moves the camera right, down and in; 1 is half the side of a square picture. Both prompts need it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows."""
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
        """Copies of both conditionings: ComfyUI keeps those that went in, for the next run."""
        camera = {CAMERA: (x_shift, y_shift, zoom)}
        moved = [node_helpers.conditioning_set_values(each, camera) for each in (positive, negative)]
        return moved[0], moved[1]


class EmptyLatent:
    """HDM Empty Latent: of the model's channels, for a size that it can draw."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES = ("LATENT",)
    DESCRIPTION = "A latent of the model's channels. Another size than it can draw is refused with the nearest one."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows."""
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
        """Zeros (batch_size, C, height/f, width/f)."""
        facts = facts_of(model)
        if width % facts.multiple or height % facts.multiple:
            near = "x".join(str(max(1, round(side / facts.multiple)) * facts.multiple) for side in (width, height))
            what = f"{width}x{height} is not made of multiples of {facts.multiple}"
            raise UserError(what, where="width, height", hint=f"take {near}")
        usual = facts.sampling.get("width"), facts.sampling.get("height")
        if all(usual) and usual != (width, height):
            logging.info(f"hdm-lightning: this model was trained to draw {usual[0]}x{usual[1]}")
        shape = (batch_size, facts.channels, height // facts.factor, width // facts.factor)
        return ({"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())},)
