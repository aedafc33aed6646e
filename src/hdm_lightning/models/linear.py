"""A linear layer without initial values of its own: `initialization` draws them once for the whole network."""

from torch import nn


class Linear(nn.Linear):
    """`torch.nn.Linear` whose parameters are allocated but not filled."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""
