"""Checkpoints of a partly trained network: they contain the trained part and a checksum of the frozen rest.

When a fit resumes, the network already has the frozen weights from the base model that it was built from.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapters import weights_sha256
from hdm_lightning.training.checkpoint_io import NETWORK_PREFIX
from hdm_lightning.training.modules.resumable_module import KEY

FROZEN = "frozen_sha256"
"""Key, in a checkpoint's position, of the checksum of the network's frozen weights."""
_SEEN = "_hdm_frozen_sha256"


def frozen_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict without its trained parameters; empty if all parameters are trained."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    if all(value.requires_grad for value in parameters.values()):
        return {}
    trained = {name for name, value in parameters.items() if value.requires_grad}
    return {name: value for name, value in network.state_dict().items() if name not in trained}


def leave_out_frozen(checkpoint: dict[str, Any], network: nn.Module) -> None:
    """Remove the frozen weights from a checkpoint about to be saved, and record their checksum."""
    frozen = frozen_state(network)
    if not frozen:
        return
    checkpoint[KEY][FROZEN] = _checksum(network, frozen)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {
        name: value for name, value in state.items() if name.removeprefix(NETWORK_PREFIX) not in frozen
    }


def put_back_frozen(checkpoint: dict[str, Any], network: nn.Module) -> None:
    """Add the network's own frozen weights to a loaded checkpoint that was saved without them.

    Raises:
        UserError: the network's frozen weights differ from those in the training, or it trains other parameters.
    """
    noted = (checkpoint.get(KEY) or {}).get(FROZEN)
    if noted is None:
        return
    frozen, names = frozen_state(network), checkpoint["state_dict"]
    saved = {name.removeprefix(NETWORK_PREFIX) for name in names if name.startswith(NETWORK_PREFIX)}
    own = set(network.state_dict()) - set(frozen)
    if own != saved or not frozen:
        odd = sorted(own ^ saved)[:3]
        raise UserError(
            f"the checkpoint contains an adapter, but the network trains other parameters: {', '.join(odd)}",
            where="ckpt_path",
            hint="pass the network with the same adapter: LoRA(…)(network), with the same rank and targets",
        )
    if noted != _checksum(network, frozen):
        raise UserError(
            "the checkpoint's adapter was trained on another base than this network",
            where="init",
            hint="set the base that the run started from, which is init in its config.yaml",
        )
    checkpoint["state_dict"].update({NETWORK_PREFIX + name: value for name, value in frozen.items()})


def _checksum(network: nn.Module, frozen: Mapping[str, Tensor]) -> str:
    """Return the checksum of the frozen weights, computed again only if the tensors have changed."""
    version = [(value.data_ptr(), value._version) for value in frozen.values()]
    known = getattr(network, _SEEN, None)
    if known is None or known[0] != version:
        known = (version, weights_sha256(frozen))
        object.__setattr__(network, _SEEN, known)
    digest: str = known[1]
    return digest
