"""The single file for any wiring: network and autoencoder, with all that describes them in its metadata.

```
network.NAME        the network under this project's names
vae.NAME            the autoencoder under diffusers' names
vae_mean, vae_std   (1,C,1,1) normalization of latents
te.NAME             a text encoder that came with a published network
```
Its metadata has a JSON object under "hdm_lightning": `xut` (the network's configuration, wiring included),
`text_encoder` (name, layer, context_length), `vae_config`, `sampling`, `training`. The published single file cannot
record a wiring, so readers assume the released network's.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hdm_lightning.interop.pipeline_folder import NETWORK_PREFIX, network_from_tensors
from hdm_lightning.interop.release import Release, release_around, tensors_beside
from hdm_lightning.models import XUTConfig

XUT_KEY = "xut"
"""Key of the metadata's object that identifies a single file."""
SUFFIX = ".safetensors"


def release_to_single(release: Release) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a single file's tensors and the object of its metadata, without the autoencoder's configuration."""
    tensors = {NETWORK_PREFIX + name: tensor for name, tensor in release.network.state_dict().items()}
    return tensors | tensors_beside(release), {**release.settings, XUT_KEY: release.network.config.to_json()}


def release_from_single(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Release:
    """Build a release from a single file's tensors and metadata; undoes `release_to_single` bit for bit.

    Raises:
        ValueError: the configuration or the tensors are not those of a network; the message lists what differs.
    """
    if not isinstance(settings[XUT_KEY], dict):
        raise ValueError(f"the metadata's {XUT_KEY} is not an object")
    config = XUTConfig.from_json(settings[XUT_KEY])
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(NETWORK_PREFIX)}
    network = network_from_tensors(config, own)
    others = {key: value for key, value in settings.items() if key != XUT_KEY}
    return release_around(network, tensors, own, others)
