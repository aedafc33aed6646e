"""ComfyUI nodes for models of hdm-lightning; copy or link this folder into ComfyUI/custom_nodes."""

from .requirements_met import require_comfyui, require_hdm_lightning

require_comfyui()
require_hdm_lightning()

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402  (only after the requirements are checked)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
