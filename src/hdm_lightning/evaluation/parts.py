"""The parts of an evaluation: their names, headings, and the functions that measure them.

Light to import, for `--help`: a function is imported when its part is to be measured.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hdm_lightning.evaluation.context import Measuring


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        key: as on the command line, and in the results.
        title: its heading.
        about: a line of help.
        function: `module:name` in this package.
    """

    key: str
    title: str
    about: str
    function: str

    def load(self) -> "Measuring":
        """The function that measures it."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(f"{__package__}.{module}"), name)


PARTS = {
    part.key: part
    for part in (
        Part("loss", "Flow loss", "flow loss by time, on held-out and on training images", "flow_loss:measure_loss"),
        Part(
            "frechet",
            "Fréchet distance",
            "Fréchet distance on named features (FID with --features inception)",
            "set_parts:frechet",
        ),
        Part(
            "kernel",
            "Kernel distance",
            "kernel distance on them (KID with --features inception); CMMD with --clip",
            "set_parts:kernel",
        ),
        Part(
            "neighbours",
            "Precision, recall, density, coverage",
            "precision, recall, density, coverage",
            "set_parts:neighbours",
        ),
        Part(
            "agreement",
            "Agreement of images with their captions",
            "do images go with their captions: CLIPScore with --clip, else a small head trained on the training set",
            "caption_parts:agreement",
        ),
        Part(
            "shapes",
            "Following prompts of shapes",
            "following prompts of shapes, where the data are shapes",
            "caption_parts:shapes",
        ),
        Part("diversity", "Diversity", "how different images of one prompt are", "drawing_parts:diversity"),
        Part("aspect", "Aspect ratios", "other aspect ratios against squares", "drawing_parts:aspect"),
        Part("camera", "Camera", "does the image move as x_shift, y_shift and zoom say", "drawing_parts:camera"),
        Part("copies", "Nearest training images", "nearest training images", "set_parts:copies"),
    )
}
