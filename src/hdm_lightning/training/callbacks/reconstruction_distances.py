"""Distance of an autoencoder's reconstructions from pictures on a named feature network, gathered over processes.

Shapes: image and output (B,3,H,W) in [-1, 1]; index and weight (B,); features (N,D).
"""

import torch
from torch import Tensor

from hdm_lightning.generation.image_files import to_uint8
from hdm_lightning.metrics.distances import FEWEST_SAMPLES, frechet_distance, frechet_needs, kernel_distance, moments
from hdm_lightning.metrics.features import FeatureNetwork, frechet_name, kernel_name
from hdm_lightning.training.strategies import processes


class ReconstructionDistances:
    """Collects the features of pictures and of their reconstructions.

    Args:
        network: frozen.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self._index: list[int] = []
        self._real, self._decoded = [torch.zeros(0, network.width)], [torch.zeros(0, network.width)]

    @torch.no_grad()
    def update(self, image: Tensor, output: Tensor, index: Tensor, weight: Tensor) -> None:
        """Add pictures and their reconstructions, those of weight 0 left out; `index` says where each one belongs."""
        kept = weight > 0
        self._index += index[kept].tolist()
        if not kept.any():
            return
        with torch.autocast(image.device.type, enabled=False):
            self._real.append(self.network(to_uint8(image[kept])).cpu())
            self._decoded.append(self.network(to_uint8(output[kept])).cpu())

    def report(self) -> dict[str, float]:
        """Return the distances that so many pictures allow; every process calls this together, to the same result.

        The kernel distance is that of one half's reconstructions to the pictures of the other half, unbiased; the
        Fréchet distance is that of all reconstructions to their own pictures, from D + 1 pictures on.
        """
        parts = processes.gathered((self._index, torch.cat(self._real), torch.cat(self._decoded)))
        order = torch.tensor([number for index, _, _ in parts for number in index]).argsort()
        real, decoded = (torch.cat([part[which] for part in parts])[order] for which in (1, 2))
        found: dict[str, float] = {}
        half = len(real) // 2
        if half >= FEWEST_SAMPLES:
            found[f"reconstruction/{kernel_name(self.network)}"] = kernel_distance(real[half:], decoded[:half])
        if len(real) >= frechet_needs(self.network.width):
            distance = frechet_distance(moments(real), moments(decoded))
            found[f"reconstruction/r{frechet_name(self.network)}"] = distance
        return found
