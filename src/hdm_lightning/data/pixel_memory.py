"""The pixels of a Pillow image as a tensor without copying them, by the Arrow C data interface.

Shapes: H×W pixels.
"""

import ctypes
from typing import Any

import torch
from PIL import Image
from torch import Tensor


class _ArrowArray(ctypes.Structure):
    """`struct ArrowArray` of the Arrow C data interface (arrow.apache.org/docs/format/CDataInterface.html)."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]


def rgb_pixels(image: Image.Image) -> tuple[Tensor, Any]:
    """The pixels of an RGB image: uint8 (1,4,H,W) in channels-last memory, the fourth channel without meaning.

    Returns:
        The tensor, to be read only, and what keeps its memory alive: hold it as long as the tensor is used.

    Raises:
        ValueError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"image must be RGB, got {image.mode}")
    memory: Any = _shared(image)
    if memory is None:
        memory = bytearray(image.tobytes("raw", "RGBX")), None
    buffer, owner = memory
    pixels = torch.frombuffer(buffer, dtype=torch.uint8).view(1, image.height, image.width, 4)
    return pixels.permute(0, 3, 1, 2), owner


def _shared(image: Image.Image) -> tuple[ctypes.Array[ctypes.c_ubyte], Any] | None:
    """The image's own memory and its owner; None where Pillow is too old or the image lies in several pieces."""
    try:
        _, capsule = image.__arrow_c_array__()
    except (AttributeError, ValueError):
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    array = _ArrowArray.from_address(pointer(capsule, b"arrow_array"))
    channels = array.children[0].contents
    if array.offset or channels.offset or channels.length != 4 * image.width * image.height:
        return None
    return (ctypes.c_ubyte * channels.length).from_address(channels.buffers[1]), capsule
