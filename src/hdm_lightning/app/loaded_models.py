"""The models that the page keeps in memory: loaded on first use; the least recently used one is dropped first."""

import gc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from hdm_lightning.generation.loading import LoadedModel, LoadOptions, load_pipeline
from hdm_lightning.generation.pipeline_adapters import adapter_files, find_adapter

State = tuple[tuple[str, int, int], ...]
"""Name, size and modification time of the files that a model was read from."""


class LoadedModels:
    """At most `keep` models, each with its LoRAs and precision; a model is reloaded if its files have changed.

    Args:
        keep: number of models in memory.
        load: loads a model.
    """

    def __init__(self, keep: int, load: Callable[[Path, LoadOptions], LoadedModel] = load_pipeline) -> None:
        self.keep, self._load = keep, load
        self._held: OrderedDict[tuple[Path, LoadOptions], tuple[LoadedModel, State]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def load(self, path: Path, options: LoadOptions) -> LoadedModel:
        """Return the model, from memory if its files are unchanged; otherwise see `load_pipeline`."""
        key = (path, options)
        held = self._held.pop(key, None)
        if held is None or held[1] != _state(held[0], options):
            held = None
            self._make_room()
            loaded = self._load(path, options)
            held = (loaded, _state(loaded, options))
        self._held[key] = held
        return held[0]

    def _make_room(self) -> None:
        while len(self._held) >= self.keep:
            self._held.popitem(last=False)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _state(loaded: LoadedModel, options: LoadOptions) -> State:
    adapters = (file for use in options.adapters for file in adapter_files(find_adapter(use.name)))
    files = [file for file in (*loaded.weight_files, *adapters) if file.exists()]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
