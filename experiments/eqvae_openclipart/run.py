"""Compare the same small autoencoder with and without EQ-VAE's regularization, and a small XUT trained on each.

Runs the project's own commands one after another, and skips what is done; then writes results.json, table.md,
figure.png and pictures.png beside this file. Run it from the repository's top folder.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from hdm_lightning.autoencoding.transforms import measured_transforms
from hdm_lightning.data.rules import StreamConfig, sources_from
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.evaluation.image_sets import middle_crops, real_images
from hdm_lightning.metrics.autoencoder_quality import AutoencoderMeasures
from hdm_lightning.metrics.comparisons import holm, paired_difference

HERE = Path(__file__).parent
DATA = Path("data/openclipart-mini")
TRAINING = [str(DATA / f"openclipart-0000{number}.tar") for number in range(3)]
HELD_OUT = str(DATA / "openclipart-00003.tar")
SIDE, FACTOR = 64, 4  # pixels per image side, pixels per latent cell
PLAIN = ["equivariance.equivariant=0", "equivariance.downscaled=0"]
# The paper's probabilities and its range of scales, 1/4 to 1, in eighths, which are exact at 32 and 64 px.
EQ = [
    "equivariance.equivariant=0.5",
    "equivariance.downscaled=0.125",
    "equivariance.scale_numerators=[2,3,4,5,6,7]",
]
# The paper's own case: an autoencoder that is already trained, here the plain one of the seed, at half its rate.
TRAINED = ["autoencoder.config=null", "autoencoder.source={runs}/plain-{seed}/vae/final", "stage.learning_rate=2e-3"]
VARIANTS = {
    "plain": PLAIN,
    "eq": EQ,
    "eq-antialias": [*EQ, "equivariance.antialias=true"],
    "longer": [*PLAIN, *TRAINED],
    "tuned": [*EQ, *TRAINED],
}
PAIRS = [("eq", "plain"), ("eq-antialias", "plain"), ("tuned", "longer")]
"""Variants that differ only in the regularization."""
LEVEL = 0.05
AUTOENCODER = ("vae", "vae", "autoencoder")
MEASURES = {
    "PSNR (dB)": (*AUTOENCODER, "reconstruction_psnr_db"),
    "SSIM": (*AUTOENCODER, "reconstruction_ssim"),
    "perceptual (Lite0, not LPIPS)": (*AUTOENCODER, "reconstruction_efficientnet_lite0"),
    "reconstruction kernel distance": ("vae", "vae", "distances", "kernel_efficientnet_lite0"),
    "encoder error, rotation": (*AUTOENCODER, "equivariance_encoder_rotation"),
    "encoder error, scale": (*AUTOENCODER, "equivariance_encoder_scale"),
    "encoder error, scale 1/4": (*AUTOENCODER, "equivariance_encoder_scale_0.25"),
    "encoder error, scale 1/2": (*AUTOENCODER, "equivariance_encoder_scale_0.50"),
    "encoder error, scale 3/4": (*AUTOENCODER, "equivariance_encoder_scale_0.75"),
    "encoder error, antialiased scale": (*AUTOENCODER, "equivariance_encoder_scale_antialiased"),
    "encoder error, antialiased 1/4": (*AUTOENCODER, "equivariance_encoder_scale_antialiased_0.25"),
    "encoder error, antialiased 1/2": (*AUTOENCODER, "equivariance_encoder_scale_antialiased_0.50"),
    "encoder error, antialiased 3/4": (*AUTOENCODER, "equivariance_encoder_scale_antialiased_0.75"),
    "decoder error, rotation": (*AUTOENCODER, "equivariance_decoder_rotation"),
    "decoder error, scale": (*AUTOENCODER, "equivariance_decoder_scale"),
    "PSNR of rotated latents (dB)": (*AUTOENCODER, "equivariance_psnr_db_rotation"),
    "PSNR of scaled latents (dB)": (*AUTOENCODER, "equivariance_psnr_db_scale"),
    "kernel distance of generated images": ("model", "ema", "kernel", "kernel_efficientnet_lite0"),
}
"""Title: its place in an evaluation.json (which evaluation, weights, part, name)."""
LOSS = "flow loss, held out"
BESIDE = {
    "encoder error, rotation, centered": "equivariance/encoder_rotation_centred",
    "encoder error, scale, centered": "equivariance/encoder_scale_centred",
    "latent power in the lowest of eight rings": "latent/spectrum_0",
}
"""Title: name among the statistics of the whole set, which do not exist per image."""


def main() -> None:
    """Train and measure every variant with every seed, then summarize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vae-samples", type=int, default=40_000)
    parser.add_argument("--model-samples", type=int, default=64_000)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=Path("runs/eqvae_openclipart"))
    parser.add_argument("--table", action="store_true", help="only write table.md from results.json")
    arguments = parser.parse_args()
    if arguments.table:
        recorded = json.loads((HERE / "results.json").read_text())
        (HERE / "table.md").write_text(table(recorded["values"], recorded["block_means"]))
        return
    found: dict[str, dict[str, list[float]]] = {}
    for seed in arguments.seeds:
        for variant in VARIANTS:
            folder = arguments.runs / f"{variant}-{seed}"
            overrides = [each.format(runs=arguments.runs, seed=seed) for each in VARIANTS[variant]]
            train_autoencoder(folder / "vae", overrides, seed, arguments.vae_samples)
            train_model(folder / "model", folder / "vae", seed, arguments.model_samples)
            measure(folder, seed, arguments.pictures)
            for name, value in read(folder).items():
                found.setdefault(name, {}).setdefault(variant, []).append(value)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("runs", "table")}
    blocks = block_means()
    results = {"settings": settings, "values": found, "block_means": blocks}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "table.md").write_text(table(found, blocks))
    draw(found, blocks, HERE / "figure.png")
    beside([arguments.runs / f"{variant}-{arguments.seeds[0]}" for variant in ("plain", "eq")], HERE / "pictures.png")
    print(table(found, blocks))


def train_autoencoder(folder: Path, overrides: list[str], seed: int, samples: int) -> None:
    """Train one autoencoder; the first seven eighths on patches."""
    command(
        folder / "final" / "README.md",
        "hdm-train-vae",
        "vae_training=from_scratch_tiny",
        *on_drawings(folder, seed),
        f"stage.samples={samples}",
        f"patches.samples={samples * 7 // 8}",
        "validation.samples=128",
        "callbacks.weight_averages.halflife_samples=[1000]",
        *overrides,
    )


def train_model(folder: Path, autoencoder: Path, seed: int, samples: int) -> None:
    """Train one XUT on the autoencoder's latents; everything else is the same."""
    command(
        folder / "final" / "model_index.json",
        "hdm-train",
        "experiment=demo",
        *on_drawings(folder, seed),
        f"vae.name={autoencoder / 'final'}",
        "~schedule.stages.px48",
        f"schedule.stages.px64.samples={samples}",
        "schedule.stages.px64.sample_every=0",
        "callbacks.sample_images.prompts=[a red apple,a green leaf,a yellow sun,a black cat]",
        "validation.samples=240",
    )


def on_drawings(folder: Path, seed: int) -> list[str]:
    """Return the common settings of both trainings: three shards to train on, the fourth held out."""
    return [
        "trainer=cpu",
        "hardware.threads=1",
        "data=openclipart_mini",
        f"data.train=[{','.join(TRAINING)}]",
        f"data.validation={HELD_OUT}",
        "data.num_workers=0",
        f"run_dir={folder}",
        f"seed={seed}",
    ]


def measure(folder: Path, seed: int, pictures: int) -> None:
    """Evaluate autoencoder and model on the held-out drawings."""
    counts = ["--seed", str(seed), "--resamples", "200", "--set-resamples", "20"]
    command(
        folder / "vae-evaluation" / "evaluation.json",
        "hdm-evaluate",
        "vae",
        str(folder / "vae"),
        *("--data", HELD_OUT, "--size", "64", "--samples", "250", *counts, "--out", str(folder / "vae-evaluation")),
    )
    command(
        folder / "model-evaluation" / "evaluation.json",
        "hdm-evaluate",
        str(folder / "model"),
        *("--parts", "kernel", "--weights", "ema", "--samples", str(pictures), "--batch", "64", *counts),
        *("--out", str(folder / "model-evaluation")),
    )


def command(result: Path, name: str, *arguments: str) -> None:
    """Run a command of the project unless its result already exists."""
    if not result.exists():
        print("$", name, *arguments, flush=True)
        subprocess.run([str(Path(sys.executable).parent / name), *arguments], check=True)


def read(folder: Path) -> dict[str, float]:
    """Return every measure of one variant and seed."""
    found: dict[str, Any] = {
        kind: json.loads((folder / f"{kind}-evaluation" / "evaluation.json").read_text()) for kind in ("vae", "model")
    }
    values = {
        title: float(found[kind]["results"][weights][part]["measures"][name]["value"])
        for title, (kind, weights, part, name) in MEASURES.items()
    }
    record = found["vae"]["results"]["vae"]["autoencoder"]["record"]
    values |= {title: record[name] for title, name in BESIDE.items()}
    done = json.loads(next((folder / "model").glob("01-*/done.json")).read_text())
    values[LOSS] = min(value for name, value in done["validation"].items() if name.startswith("ema"))
    return values


def block_means() -> dict[str, float]:
    """Return the same measures for an encoder without training: the mean of every 4×4 pixels, repeated to decode.

    It commutes exactly with turns, and with halving without antialiasing; its other errors come from the sampling.
    """
    measures = AutoencoderMeasures(
        lambda image: (F.avg_pool2d(image, FACTOR), torch.zeros(len(image), 3, SIDE // FACTOR, SIDE // FACTOR)),
        lambda latent: latent.repeat_interleave(FACTOR, -1).repeat_interleave(FACTOR, -2),
        channels=3,
        factor=FACTOR,
        transforms=measured_transforms(SIDE // FACTOR),
    )
    stream = middle_crops(StreamConfig(sources_from([HELD_OUT], "data"), SIDE, 1, stage="validation"))
    for batch in real_images(stream, Plan(stream), 250):
        measures.update(batch.images / 127.5 - 1)
    found = measures.report()
    names = {title: name.replace("_", "/", 1) for title, (_, _, _, name) in MEASURES.items()}
    names |= BESIDE
    return {title: found[name] for title, name in names.items() if name in found}


def table(found: dict[str, dict[str, list[float]]], blocks: dict[str, float]) -> str:
    """Return mean ± standard deviation over seeds; then the paired differences."""
    lines = [row("measure", *VARIANTS, "block means"), row(*["---"] * (len(VARIANTS) + 2))]
    for name, by_variant in found.items():
        block = f"{round(blocks[name], 4):.3g}" if name in blocks else ""
        lines.append(row(name, *(spread(values) for values in by_variant.values()), block))
    return "\n".join(lines) + "\n\n" + differences_table(found)


def differences_table(found: dict[str, dict[str, list[float]]]) -> str:
    """Return paired differences with 95% intervals (Student's t); bold ones are significant by Holm over the table."""
    differences = {
        (name, pair): paired_difference(by_variant[pair[1]], by_variant[pair[0]])
        for name, by_variant in found.items()
        for pair in PAIRS
    }
    adjusted = holm({f"{name} {pair}": one.p for (name, pair), one in differences.items()})
    lines = [row("difference", *(f"{one} − {other}" for one, other in PAIRS)), row(*["---"] * (len(PAIRS) + 1))]
    for name in found:
        cells = []
        for pair in PAIRS:
            one = differences[name, pair]
            cell = f"{one.value:+.4g} ± {one.high - one.value:.2g}"
            cells.append(f"**{cell}**" if adjusted[f"{name} {pair}"] < LEVEL else cell)
        lines.append(row(name, *cells))
    return "\n".join(lines) + "\n"


def row(*cells: str) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.4g} ± {deviation:.2g}"


def draw(found: dict[str, dict[str, list[float]]], blocks: dict[str, float], path: Path) -> None:
    """Plot one panel per measure, one dot per seed; dotted lines are block means."""
    import matplotlib  # noqa: PLC0415 (only for the figure)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415 (only for the figure)

    columns = 4
    rows = -(-len(found) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 2.4 * rows), squeeze=False)
    for axis, (name, by_variant) in zip(axes.flat, found.items(), strict=False):
        for place, values in enumerate(by_variant.values()):
            axis.plot([place] * len(values), values, "o", alpha=0.7)
            axis.hlines(statistics.mean(values), place - 0.2, place + 0.2)
        if name in blocks:
            axis.axhline(blocks[name], linestyle=":", color="grey")
        axis.set_xticks(range(len(by_variant)), list(by_variant), rotation=20)
        axis.set_xlim(-0.5, len(by_variant) - 0.5)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(found) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def beside(folders: list[Path], path: Path) -> None:
    """Join the last images of each training side by side."""
    sheets = [Image.open(sorted((folder / "vae" / "01-vae" / "samples").glob("*.png"))[-1]) for folder in folders]
    gap = 8
    whole = Image.new("RGB", (sum(sheet.width + gap for sheet in sheets) - gap, sheets[0].height), "white")
    for number, sheet in enumerate(sheets):
        whole.paste(sheet, (number * (sheet.width + gap), 0))
    whole.save(path)


if __name__ == "__main__":
    main()
