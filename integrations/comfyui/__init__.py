"""Nodes for ComfyUI that draw with the models of hdm-lightning; copy or link this folder into ComfyUI/custom_nodes."""

from .requirements_met import require_comfyui, require_hdm_lightning

require_comfyui()
require_hdm_lightning()

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402  (what is missing is told first)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
