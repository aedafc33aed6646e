"""The one shape in which samples reach a training loop.

Shapes: B samples, H×W pixels, L token places.
"""

from typing import NotRequired, TypedDict

from torch import Tensor


class Batch(TypedDict):
    """What every loader of this project yields.

    A hole (a sample that could not be read) keeps its row: a black image, a crop of the whole of it, one padding
    token, an empty caption and weight 0, so that shapes, order and the plan of every other sample stay as they were.
    """

    image: Tensor
    """uint8 (B,3,H,W), RGB."""
    crop: Tensor
    """float32 (B,4): top, left, full_height, full_width of the crop, in pixels of the resized full image."""
    tokens: Tensor
    """int64 (B,L): caption tokens, padded to the context length."""
    lengths: Tensor
    """int64 (B,): true token counts, at least 1."""
    index: Tensor
    """int64 (B,): position in the stage's global order."""
    weight: Tensor
    """float32 (B,): 1, or 0 for a hole."""
    keys: list[str]
    """`shard/key` of each sample."""
    captions: list[str]
    """The caption as chosen, before tokenization."""
    set_size: NotRequired[int]
    """Positions of the whole validation set; only in its batches."""
