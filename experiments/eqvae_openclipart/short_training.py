"""How far a short training lowers the encoder's equivariance errors, with and without antialiasing, and at what cost.

Runs hdm-train-vae, one training after another, and skips what is done; then writes short_training.json and
short_training.md beside this file. Run it from the repository's top folder.
"""

import argparse
import json
import statistics
from pathlib import Path

from run import HERE, PLAIN, command, on_drawings, row, spread

SCALES = "equivariance.scale_numerators=[2,3,4,5,6,7]"
HALF = ["equivariance.equivariant=0.5", "equivariance.downscaled=0.125", SCALES]
MORE = ["equivariance.equivariant=0.75", "equivariance.downscaled=0.125", SCALES]
ANTIALIAS = "equivariance.antialias=true"
VARIANTS = {
    "plain": PLAIN,
    "0.5": HALF,
    "0.5, antialias": [*HALF, ANTIALIAS],
    "0.75": MORE,
    "0.75, antialias": [*MORE, ANTIALIAS],
}
MEASURES = {
    "PSNR (dB)": "reconstruction/psnr_db",
    "encoder error, rotation": "equivariance/encoder_rotation",
    "encoder error, scale": "equivariance/encoder_scale",
    "encoder error, antialiased scale": "equivariance/encoder_scale_antialiased",
    "encoder error, antialiased 1/4": "equivariance/encoder_scale_antialiased_0.25",
    "encoder error, antialiased 1/2": "equivariance/encoder_scale_antialiased_0.50",
    "encoder error, antialiased 3/4": "equivariance/encoder_scale_antialiased_0.75",
    "encoder error, rotation, centered": "equivariance/encoder_rotation_centred",
    "encoder error, scale, centered": "equivariance/encoder_scale_centred",
    "encoder error, antialiased scale, centered": "equivariance/encoder_scale_antialiased_centred",
}


def main() -> None:
    """Train every variant with every seed, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/eqvae_short"))
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {name: {variant: [] for variant in VARIANTS} for name in MEASURES}
    for seed in arguments.seeds:
        for variant, overrides in VARIANTS.items():
            folder = arguments.runs / f"{variant.replace(', ', '-')}-{seed}"
            train(folder, overrides, seed)
            measures = json.loads((folder / "final" / "measures.json").read_text())["measures"]
            for name, key in MEASURES.items():
                found[name][variant].append(measures[key])
    (HERE / "short_training.json").write_text(json.dumps({"seeds": arguments.seeds, "values": found}, indent=1) + "\n")
    (HERE / "short_training.md").write_text(table(found))
    print(table(found))


def train(folder: Path, overrides: list[str], seed: int) -> None:
    """Train on 8,000 samples at 128 px, seven eighths of them patches of 64 px; measure all held-out drawings."""
    command(
        folder / "final" / "README.md",
        "hdm-train-vae",
        "vae_training=from_scratch_tiny",
        *on_drawings(folder, seed),
        "stage.resolution=128",
        "stage.samples=8000",
        "patches.size_px=64",
        "patches.samples=7008",
        "validation.samples=250",
        "validation.images=0",
        *overrides,
    )


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Return mean ± standard deviation over seeds, and for errors the mean over seeds of their ratio to plain's."""
    lines = [row("measure", *VARIANTS), row(*["---"] * (len(VARIANTS) + 1))]
    for name, by_variant in found.items():
        shown = {variant: spread(values) for variant, values in by_variant.items()}
        if "error" in name:
            for variant in list(VARIANTS)[1:]:
                shares = [one / other for one, other in zip(by_variant[variant], by_variant["plain"], strict=True)]
                shown[variant] += f" (×{statistics.mean(shares):.2f})"
        lines.append(row(name, *shown.values()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
