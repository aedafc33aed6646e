"""Start from a trained model's weights, and report which tensors were loaded and which were not."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdm_lightning.encoders.pretrained import is_local_path
from hdm_lightning.encoders.vae_folder import WEIGHTS
from hdm_lightning.errors import UserError
from hdm_lightning.interop.layouts import UNET_FOLDER, stated_config, stated_license
from hdm_lightning.interop.model_card import recorded_license
from hdm_lightning.interop.network_copies import one_network, told
from hdm_lightning.interop.pipeline_folder import TRANSFORMER, holding, read_pipeline_folder
from hdm_lightning.interop.published import find_prefix, own_tensors, strip_prefix, unwrapped
from hdm_lightning.interop.tensor_files import read_tensors, require_finite, shards
from hdm_lightning.json_files import object_or_empty
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from hdm_lightning.models.config import WIRING
from hdm_lightning.printable import in_one_line
from hdm_lightning.training.base_model import base_folder
from hdm_lightning.training.checkpoint_io import NETWORK_PREFIX
from hdm_lightning.training.recorded import read_recorded
from hdm_lightning.training.run_folder import CONFIG
from hdm_lightning.whole_files import write_json

MODEL_FILE = "model.safetensors"
_STORED = f"{TRANSFORMER}/{WEIGHTS}.safetensors"
_OURS = (_STORED, MODEL_FILE, f"final/{_STORED}", f"final/{MODEL_FILE}")
PLACES = (*_OURS, f"{WEIGHTS}.safetensors", f"{UNET_FOLDER}/{WEIGHTS}.safetensors")
"""Where the network's weights are in the folder of a model, of a run, or of diffusers."""
RECORD = "init.json"


@dataclass(frozen=True)
class InitReport:
    """The fate of each tensor of the network and of the file.

    Attributes:
        source: the value of `init`.
        loaded: taken from the file.
        missing: not in the file; they keep their fresh initialization.
        reshaped: in the file with another shape; they keep their fresh initialization.
        unused: in the file but not in the network.
        wiring: descriptions of the wiring fields in which the file's network differs from this one.
        license: license of the file's network, from its metadata, the card beside it or its run.
        copies: name prefixes of further copies of the network in the file.
    """

    source: str
    loaded: list[str]
    missing: list[str]
    reshaped: list[str]
    unused: list[str]
    wiring: list[str]
    license: str | None = None
    copies: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"init from {self.source}: {len(self.loaded)} tensors loaded; all names in the run's {RECORD}"]
        for label, names in (
            ("missing, initialized afresh", self.missing),
            ("other shape, initialized afresh", self.reshaped),
            ("in the file but not used", self.unused),
        ):
            if names:
                lines.append(f"  {label}: {len(names)}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}")
        if self.copies:
            lines.append(f"  {told(self.source, self.copies)}")
        if self.wiring:
            lines.append(f"  warning: the weights were made for another wiring: {', '.join(self.wiring)}")
        return "\n".join(map(in_one_line, lines))


def record_init(run_dir: Path, report: InitReport) -> None:
    """Write the complete report into the run's folder."""
    write_json(run_dir / RECORD, asdict(report))


def read_init(run_dir: Path) -> dict[str, Any]:
    """Return the run's record of the model it started from; empty if it started from none or the record is damaged:
    the card is no reason to lose an export.
    """
    return object_or_empty(run_dir / RECORD)


def load_initial_weights(network: nn.Module, source: str) -> InitReport:
    """Copy every tensor that fits from a run's folder, a model folder or a file of tensors into the network.

    Raises:
        UserError: the file is missing or cannot be read, or no tensor fits.
    """
    files = find_weights(source)
    path = files[0]
    try:
        read = unwrapped({name: tensor for file in files for name, tensor in read_tensors(file).items()})
        tensors, copies = one_network(read, where=str(path))
    except UserError as error:
        hint = error.hint or "name a run's or a model's folder, or a file of weights"
        raise UserError(f"{path}: {error.what}", where="init", hint=hint) from error
    found = _own_tensors(network, tensors)
    state = network.state_dict()
    fits = {name for name, value in found.items() if name in state and value.shape == state[name].shape}
    if not fits:
        raise UserError(
            f"no tensor of {source} fits the model", where="init", hint="choose the model= it was trained with"
        )
    try:
        require_finite({name: found[name] for name in fits})
    except ValueError as error:
        raise UserError(f"{path}: {error}", where="init", hint="use an earlier checkpoint, or get it again") from error
    with torch.no_grad():
        for name in fits:
            state[name].copy_(found[name])
    return InitReport(
        source,
        loaded=sorted(fits),
        missing=sorted(set(state) - set(found)),
        reshaped=sorted((set(state) & set(found)) - fits),
        unused=sorted(set(found) - set(state)),
        wiring=_other_wiring(network.config, tensors, path) if isinstance(network, XUT) else [],
        license=_license_of(path),
        copies=list(copies),
    )


def find_weights(source: str) -> tuple[Path, ...]:
    """Return the files that `init` names: the file itself, or those in the folder of a run, a model or a published
    diffusers model, or of a model on the hub; several if an index splits the weights.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return (path,)
    for place in PLACES:
        if found := shards(path / place):
            return found
    if not path.exists() and "/" in source and not is_local_path(source):
        return base_folder(source).weight_files()
    raise UserError(
        f"there is no model in {source}",
        where="init",
        hint=f"name the folder of a finished run, a folder with {MODEL_FILE}, or a file of weights",
    )


def _license_of(path: Path) -> str | None:
    """Return the license of weights; for a checkpoint in RUN/STAGE/checkpoints, the license of the run or its base."""
    run = path.absolute().parents[2:3]
    if path.suffix != ".ckpt" or not run or not (run[0] / CONFIG).is_file():
        return stated_license(path)
    own = None
    with suppress(UserError):  # a damaged record is no reason to refuse its weights
        own = (read_recorded(run[0] / CONFIG).get("hub") or {}).get("license")
    return recorded_license({"license": own, "base": read_init(run[0])})


def require_whole(report: InitReport) -> None:
    """Raise UserError unless `init` set the whole network: weights that stay frozen must have been trained."""
    odd = [
        f"{len(names)} {kind} ({', '.join(names[:3])})"
        for kind, names in (
            ("missing", report.missing),
            ("of another shape", report.reshaped),
            ("wired differently", report.wiring),
        )
        if names
    ]
    if odd:
        what = f"{report.source} does not contain the whole network that the adapter needs: {'; '.join(odd)}"
        hint = "leave the model's keys to init (as experiment=lora does), or use a complete base"
        raise UserError(what, where="init", hint=hint)


def _other_wiring(config: XUTConfig, tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Return how the file's network is wired differently from this one, if the file or its folder states it."""
    if (stated := stated_config(path)) is not None:
        wired: Mapping[str, Any] = stated.to_json()
    elif find_prefix(tensors) is not None:
        wired = PUBLISHED
    elif (place := holding(path)) is not None:
        wired = read_pipeline_folder(place[0]).xut.to_json()
    else:
        return []
    return [
        f"{name}={wired[name]} (model.{name} is {getattr(config, name)})"
        for name in WIRING
        if name in wired and wired[name] != getattr(config, name)
    ]


def _own_tensors(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the file's tensors with this project's names and shapes, from its own or the published names."""
    own = _under_own_names(network, tensors)
    if own:
        return own
    try:
        if not isinstance(network, XUT):
            raise ValueError("no tensor has a name of the network, and only an XUT has published names")
        return own_tensors(network, strip_prefix(tensors))
    except ValueError as error:
        raise UserError(str(error), where="init", hint="use a model of this project or a published one") from error


def _under_own_names(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefix that most of the network's names have in the file; empty if none match.

    A training checkpoint has the prefix `network.`, and wrappers add their own, such as `module.`.
    """
    names = list(network.state_dict())
    ends = {name.rpartition(".")[2] for name in names}
    found = Counter(
        given.removesuffix(name)
        for given in tensors
        if given.rpartition(".")[2] in ends
        for name in names
        if given == name or given.endswith(f".{name}")
    )
    if not found:
        return {}
    prefix = max(found, key=lambda each: (found[each], each == NETWORK_PREFIX, -len(each)))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
