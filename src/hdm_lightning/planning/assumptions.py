"""What a forecast assumes beyond data sheets and counting; every figure can be set, and a probe replaces the first."""

from dataclasses import dataclass

CALIBRATED_UTILISATION = 0.62
"""The one figure with which the forecast gives the paper's four stage times; `paper.calibrated_utilisation` derives
it from them."""


@dataclass(frozen=True)
class Assumptions:
    """Figures behind a forecast.

    Attributes:
        utilisation: time that the device would need at its data sheet's rates (peak operations, and full bandwidth
            for what lies between matrix products) over the time it takes.
        reserve_gib: memory that is not tensors: the driver's context, libraries' workspaces, what the allocator
            cannot use.
        power_share: share of the GPUs' power limit drawn while training.
        usd_per_kwh: price of electricity, for a machine of one's own.
    """

    utilisation: float = CALIBRATED_UTILISATION
    reserve_gib: float = 1.5
    power_share: float = 0.9
    usd_per_kwh: float = 0.30


USUAL = Assumptions()
"""What is assumed where nothing is said."""
