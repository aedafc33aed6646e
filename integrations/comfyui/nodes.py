"""The nodes, by their names in workflows."""

from . import files
from .conditioning import Camera, EmptyLatent, TextEncode
from .loaders import LoadLora, LoadModel
from .sampling import RoundPixels, RoutingGuidance, Solver, Times

files.register()

NODE_CLASS_MAPPINGS = {
    "HDMLoadModel": LoadModel,
    "HDMLoadLora": LoadLora,
    "HDMTextEncode": TextEncode,
    "HDMEmptyLatent": EmptyLatent,
    "HDMCamera": Camera,
    "HDMRoutingGuidance": RoutingGuidance,
    "HDMSolver": Solver,
    "HDMTimes": Times,
    "HDMRoundPixels": RoundPixels,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HDMLoadModel": "HDM Load Model",
    "HDMLoadLora": "HDM Load LoRA",
    "HDMTextEncode": "HDM Text Encode",
    "HDMEmptyLatent": "HDM Empty Latent",
    "HDMCamera": "HDM Camera",
    "HDMRoutingGuidance": "HDM Routing Guidance",
    "HDMSolver": "HDM Solver",
    "HDMTimes": "HDM Times",
    "HDMRoundPixels": "HDM Round Pixels",
}
