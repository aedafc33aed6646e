"""The geometric transforms that an autoencoder's equivariance is measured on."""

from hdm_lightning.autoencoding.transforms import QuarterTurn, Scale, Transform, exact_scales


def measured_transforms(cells: int) -> dict[str, dict[str, Transform]]:
    """Return each quarter turn by its degrees, and the scales 1/4, 1/2, 3/4 that are exact of so many cells a side.

    Scaling is measured both ways, without antialias as EQ-VAE's experiment takes it, and with.
    """
    scales = {f"{float(scale):.2f}": scale for scale in exact_scales(cells, (1, 2, 3), 4)}
    return {
        "rotation": {str(90 * turns): QuarterTurn(turns) for turns in (1, 2, 3)},
        "scale": {name: Scale.uniform(scale) for name, scale in scales.items()},
        "scale_antialiased": {name: Scale.uniform(scale, antialias=True) for name, scale in scales.items()},
    }
