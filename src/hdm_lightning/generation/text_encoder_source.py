"""Which text encoder a network was trained with, and finding it again from elsewhere."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from hdm_lightning.encoders.sources import PACKAGE_SCHEME

# A run's final/ lies in RUNS/NAME/ of the folder that training was started in.
LEVELS_ABOVE = 3


@dataclass(frozen=True)
class TextEncoderSource:
    """Which text encoder a network was trained with.

    Args:
        name: hub name, folder or package, as for `load_text_encoder`.
        layer: which hidden state.
        context_length: tokens a caption is cut to.
    """

    name: str
    layer: int = -1
    context_length: int = 256

    def kept(self) -> "TextEncoderSource":
        """The same with a folder's path in full, so that the network finds it from wherever it is used."""
        folder = Path(self.name).expanduser()
        return replace(self, name=os.path.abspath(folder)) if folder.is_dir() else self

    def found_from(self, folder: Path) -> "TextEncoderSource":
        """The same with a path that leads nowhere from here looked up beside the `final/` folder and above it."""
        if Path(self.name).expanduser().is_dir() or self.name.startswith(PACKAGE_SCHEME):
            return self
        above = folder.resolve().parents[:LEVELS_ABOVE]
        places = [place / self.name for place in (folder.resolve(), *above) if (place / self.name).is_dir()]
        return replace(self, name=str(places[0])) if places else self
