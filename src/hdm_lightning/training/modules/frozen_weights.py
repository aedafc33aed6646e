"""Checkpoints of a network of which only a part is trained: they hold that part, and say what the rest was.

The rest is there already where a fit resumes: whoever builds the network has it from the model that it began with.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapters import weights_sha256
from hdm_lightning.training.checkpoint_io import NETWORK_PREFIX
from hdm_lightning.training.modules.resumable_module import KEY

FROZEN = "frozen_sha256"
"""In a checkpoint's position: the checksum of what the network had beside its trained parameters."""
_SEEN = "_hdm_frozen_sha256"


def frozen_state(network: nn.Module) -> dict[str, Tensor]:
    """What is in a network's state dict beside its trained parameters; empty where all of them are trained."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    if all(value.requires_grad for value in parameters.values()):
        return {}
    trained = {name for name, value in parameters.items() if value.requires_grad}
    return {name: value for name, value in network.state_dict().items() if name not in trained}


def leave_out_frozen(checkpoint: dict[str, Any], network: nn.Module) -> None:
    """Take what is not trained out of a checkpoint that is about to be saved, and note its checksum."""
    frozen = frozen_state(network)
    if not frozen:
        return
    checkpoint[KEY][FROZEN] = _checksum(network, frozen)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {
        name: value for name, value in state.items() if name.removeprefix(NETWORK_PREFIX) not in frozen
    }


def put_back_frozen(checkpoint: dict[str, Any], network: nn.Module) -> None:
    """Put what was left out of a checkpoint that was read back from the network itself.

    Raises:
        UserError: the network has other weights there than the training had, or does not train the same parameters.
    """
    noted = (checkpoint.get(KEY) or {}).get(FROZEN)
    if noted is None:
        return
    frozen, saved = frozen_state(network), _of_network(checkpoint["state_dict"])
    own = set(network.state_dict()) - set(frozen)
    if own != set(saved) or not frozen:
        odd = sorted(own ^ set(saved))[:3]
        raise UserError(
            f"the checkpoint is one of an adapter, and the network trains other parameters: {', '.join(odd)}",
            where="ckpt_path",
            hint="give the network with the same adapter: LoRA(…)(network), with rank and targets as then",
        )
    if noted != _checksum(network, frozen):
        raise UserError(
            "the checkpoint is one of an adapter, and was trained on another base than the network given",
            where="init",
            hint="give the base that the run began with, as its config.yaml names it under init",
        )
    checkpoint["state_dict"].update({NETWORK_PREFIX + name: value for name, value in frozen.items()})


def _of_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(NETWORK_PREFIX): value for name, value in state.items() if name.startswith(NETWORK_PREFIX)
    }


def _checksum(network: nn.Module, frozen: Mapping[str, Tensor]) -> str:
    """The checksum of what is never trained: reckoned once for each state that the tensors are in."""
    version = [(value.data_ptr(), value._version) for value in frozen.values()]
    known = getattr(network, _SEEN, None)
    if known is None or known[0] != version:
        known = (version, weights_sha256(frozen))
        object.__setattr__(network, _SEEN, known)
    digest: str = known[1]
    return digest
