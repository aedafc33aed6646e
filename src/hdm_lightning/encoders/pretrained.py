"""What transformers and diffusers read from a folder, without running anything that lies in it."""

import pickle
from pathlib import Path
from typing import Any

OWN_CODE_ONLY = {"local_files_only": True, "trust_remote_code": False}
"""Left open, `trust_remote_code` asks on the terminal, and one `y` runs the folder's Python files."""

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, pickle.UnpicklingError)
"""What the readers raise for folders that transformers and diffusers cannot read, or only by code that lies there."""

NO_SDPA = "scaled_dot_product_attention"
"""What transformers' refusal of an architecture without it says."""


def read_transformer(folder: Path, **options: Any) -> Any:
    """A transformers model, its attention computed by torch whatever kernels its config.json names.

    Args:
        folder: with config.json and weights.
        options: for `from_pretrained`.

    Raises:
        Exception: one of `UNREADABLE`.
    """
    from transformers import AutoModel  # noqa: PLC0415  (seconds to import)

    has_safetensors = any(folder.glob("model*.safetensors"))
    options = {**OWN_CODE_ONLY, "use_safetensors": has_safetensors, **options}

    def read(attention: str) -> Any:
        # A key of config.json outdoes the argument, unless the configuration is read first.
        config = read_transformer_config(folder)
        return AutoModel.from_pretrained(str(folder), config=config, attn_implementation=attention, **options)

    try:
        return read("sdpa")
    except ValueError as error:
        if NO_SDPA not in str(error):
            raise
        return read("eager")


def read_tokenizer(folder: Path) -> Any:
    """A transformers tokenizer.

    Raises:
        Exception: one of `UNREADABLE`.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415  (seconds to import)

    return AutoTokenizer.from_pretrained(str(folder), **OWN_CODE_ONLY)


def read_transformer_config(folder: Path) -> Any:
    """The configuration of a transformers model.

    Raises:
        Exception: one of `UNREADABLE`.
    """
    from transformers import AutoConfig  # noqa: PLC0415  (seconds to import)

    return AutoConfig.from_pretrained(str(folder), **OWN_CODE_ONLY)
