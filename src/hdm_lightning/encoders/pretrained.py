"""Pretrained models: where their files are, and what is read of them without running anything that lies there.

A model lies in a folder, an installed package, the hub's cache, or is downloaded once.
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

from hdm_lightning.errors import UserError, first_line
from hdm_lightning.whole_files import write_json

PACKAGE_SCHEME = "package:"
RUNS, FINAL = "runs", "final"
"""Where trainings write unless told otherwise, and the folder of what they made."""
LONGEST_CONTEXT = 1_000_000
"""Tokens of text; of a file that says more it is not believed."""
_NAMED = ("_name_or_path", "name_or_path")
# A run's final/ lies in RUNS/NAME/ of the folder that training was started in.
_LEVELS_ABOVE = 3
# Names that could not be had, with the reason and when: a command's next request does not wait for the network again,
# while a session that goes on may have logged in since.
_unreachable: dict[str, tuple[str, float]] = {}
_REMEMBERED_S = 60.0

OWN_CODE_ONLY = {"local_files_only": True, "trust_remote_code": False}
"""Left open, `trust_remote_code` asks on the terminal, and one `y` runs the folder's Python files."""

UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    pickle.UnpicklingError,
)
"""What the readers raise for folders that transformers and diffusers cannot read, or only by code that lies there.

Both take the values of a config.json as they stand: `act_fn: true` is an AttributeError, groups of 0 divide by zero.
"""


@contextmanager
def readable(reading: str, folder: Path, *, where: str, hint: str | None = None) -> Iterator[None]:
    """Inside the with statement, what readers raise is a UserError: "`reading` from `folder` (first line)"."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{reading} from {folder} ({first_line(error)})", where=where, hint=hint) from error


NO_SDPA = "scaled_dot_product_attention"
"""What transformers' refusal of an architecture without it says."""


def read_transformer(folder: Path, **options: Any) -> Any:
    """A transformers model, its attention computed by torch whatever kernels its config.json names.

    Raises Exception: one of `UNREADABLE`.
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
    """A transformers tokenizer. Raises Exception: one of `UNREADABLE`."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (seconds to import)

    return AutoTokenizer.from_pretrained(str(folder), **OWN_CODE_ONLY)


def read_transformer_config(folder: Path) -> Any:
    """The configuration of a transformers model. Raises Exception: one of `UNREADABLE`."""
    from transformers import AutoConfig  # noqa: PLC0415  (seconds to import)

    return AutoConfig.from_pretrained(str(folder), **OWN_CODE_ONLY)


def locate_model(
    name_or_path: str, *, where: str, required: Sequence[str], download: Sequence[str] | None = None, **hub: Any
) -> Path:
    """The local folder that holds a pretrained model, downloaded from the hub at most once.

    The hub is not asked for what was meant as a folder; see `is_local_path`.

    Args:
        name_or_path: a folder; `package:NAME/FOLDER` for files inside an installed Python package; or a hub
            name `OWNER/NAME`, with an optional folder inside it, `OWNER/NAME/FOLDER`.
        where: the configuration key or argument to name in errors.
        required: glob patterns; the folder must hold a match for at least one of each `|`-separated group.
        download: glob patterns of what to fetch from the hub; None takes the single patterns of `required`.
        hub: further options of `huggingface_hub.snapshot_download`, such as `revision`.

    Raises:
        UserError: if there is no such model, saying what to download and where to put it.
    """
    if not name_or_path:
        raise UserError("is empty", where=where, hint="give a hub name, a folder or package:NAME/FOLDER")
    if name_or_path.startswith(PACKAGE_SCHEME):
        return _require(_package_folder(name_or_path, where), name_or_path, where, required)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return _require(folder, name_or_path, where, required)
    if not _is_hub_name(name_or_path):
        raise UserError(
            f"there is no folder {name_or_path!r}",
            where=where,
            hint="give an existing folder, a hub name OWNER/NAME, or package:NAME/FOLDER",
        )
    patterns = list(download or [p for group in required for p in group.split("|")])
    return _hub_folder(name_or_path, where, required, patterns, hub)


def same_model(first: str, second: str) -> bool:
    """Whether two names of a pretrained model lead to one folder, asked of this machine alone, without a download."""
    if first == second:
        return True
    folders = [_folder_here(name) for name in (first, second)]
    return all(folders) and os.path.samefile(*folders)  # type: ignore[arg-type]


def _folder_here(name: str) -> Path | None:
    """The folder that a name leads to, if it is on this machine."""
    try:
        found = _package_folder(name, "") if name.startswith(PACKAGE_SCHEME) else Path(name).expanduser()
    except UserError:
        return None
    if found.is_dir():
        return found
    if not _is_hub_name(name):
        return None
    owner, repository, *inside = name.split("/")
    return _snapshot(f"{owner}/{repository}", "/".join(inside), ["config.json"], local_files_only=True)[0]


def is_local_path(name: str) -> bool:
    """Whether a name that leads nowhere here was meant as a folder, so that the hub is not asked for it.

    It begins as paths do, lies below a folder that exists here or below `runs`, or names a run's `final`.
    """
    parts = name.split("/")
    if name[:1] in (".", "/", "~") or "\\" in name or not all(parts):
        return True
    return len(parts) > 1 and (parts[0] == RUNS or FINAL in parts or Path(parts[0]).is_dir())


def require_there(name: str, hint: str) -> None:
    """Raise UserError where a model's name leads nowhere here and was meant as a path."""
    if ("/" not in name or is_local_path(name)) and not Path(name).exists():
        raise UserError("does not exist", where=name, hint=hint)


def lies_here(name: str) -> bool:
    """Whether a model's name is a folder of this machine, which may have a hub's name or a plain one such as `bert`."""
    return is_local_path(name) or Path(name).expanduser().is_dir()


def _is_hub_name(name: str) -> bool:
    return "/" in name and not is_local_path(name)


def _complete(folder: Path, required: Sequence[str]) -> bool:
    return all(any(any(folder.glob(p)) for p in group.split("|")) for group in required)


def _require(folder: Path, name: str, where: str, required: Sequence[str]) -> Path:
    if not _complete(folder, required):
        missing = [group for group in required if not _complete(folder, [group])]
        raise UserError(
            f"the folder of {name!r} lacks {', '.join(missing)}",
            where=where,
            hint="give the folder that save_pretrained wrote, or download the model again",
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
        raise UserError(f"the Python package {package!r} holds no folder {inside!r}", where=where)
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
        if not local_files_only and folder is None:  # one that lacks a file may have what is asked for next
            _unreachable[name] = (reason, time.monotonic())
    reason = reason if asked else known or reason
    raise UserError(
        f"the model {name!r} is not on this machine and could not be downloaded ({reason})",
        where=where,
        hint=f"on a machine with network run `hf download {repo_id}` and either copy the folder here and "
        "give its path, or put it in the hub cache ($HF_HOME/hub); gated models need `hf auth login` first",
    )


def _snapshot(repo_id: str, subfolder: str, patterns: Sequence[str], **hub: Any) -> tuple[Path | None, str]:
    """The snapshot's folder, or None; and what to say if it is not enough."""
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
    """Which text encoder a network was trained with.

    Args:
        name: hub name, folder or package, as for `load_text_encoder`.
        layer: which hidden state.
        context_length: tokens a caption is cut to.
    """

    name: str
    layer: int = -1
    context_length: int = 256

    @classmethod
    def from_json(cls, written: Any) -> "TextEncoderSource":
        """The source that a file describes. Raises ValueError: it is no mapping of these fields, or of wrong types."""
        if not isinstance(written, Mapping):
            raise ValueError(f"text_encoder is {written!r}, expected name, layer and context_length")
        source = cls(**{key: value for key, value in written.items() if key in cls.__dataclass_fields__})
        numbers = (source.layer, source.context_length)
        if not isinstance(source.name, str) or not all(type(number) is int for number in numbers):
            raise ValueError(f"text_encoder is {dict(written)}, expected a name and whole numbers")
        if not 1 <= source.context_length <= LONGEST_CONTEXT:
            raise ValueError(f"context_length is {source.context_length}, expected 1 to {LONGEST_CONTEXT}")
        return source

    def kept(self) -> "TextEncoderSource":
        """The same with a folder's path in full, so that the network finds it from wherever it is used."""
        folder = Path(self.name).expanduser()
        return replace(self, name=os.path.abspath(folder)) if folder.is_dir() else self

    def found_from(self, folder: Path) -> "TextEncoderSource":
        """The same with a path that leads nowhere from here looked up beside the model's folder and above it."""
        if Path(self.name).expanduser().is_dir() or self.name.startswith(PACKAGE_SCHEME):
            return self
        above = folder.resolve().parents[:_LEVELS_ABOVE]
        places = [place / self.name for place in (folder.resolve(), *above) if (place / self.name).is_dir()]
        return replace(self, name=str(places[0])) if places else self


def require_finite_model(model: Any, name: str, where: str) -> None:
    """Raise UserError unless all weights of a model are numbers; `name` says in the error which one it is."""
    for key, value in model.state_dict().items():
        if not value.is_floating_point() or value.is_meta:
            continue
        if not (value.float() if value.dtype.itemsize < 2 else value).isfinite().all():
            hint = "get it again, or take an earlier checkpoint of its training"
            raise UserError(f"the weights of {name} hold NaN or infinity, in {key}", where=where, hint=hint)


def forget_places(folder: Path) -> None:
    """Take out of the JSON files below a folder from where on this machine its models were read.

    Libraries note that where they save, under `_name_or_path` and `name_or_path`; a hub's name stays.
    """
    for path in folder.rglob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # not for us to put right
            continue
        if not isinstance(content, dict):
            continue
        named = {key: content[key] for key in _NAMED if isinstance(content.get(key), str)}
        kept = {key: value for key, value in content.items() if key not in named or not is_local_path(named[key])}
        if len(kept) < len(content):
            write_json(path, kept)
