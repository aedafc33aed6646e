"""An autoencoder in a plain Trainer, with a discriminator and without: the same contract as of flow matching."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from hdm_lightning import AutoencoderModule
from hdm_lightning.autoencoding.transforms import Scale, exact_scales
from hdm_lightning.errors import UserError
from hdm_lightning.models.discriminator import PatchDiscriminator
from hdm_lightning.training.callbacks.autoencoder_report import AutoencoderReport
from hdm_lightning.training.callbacks.images import ReconstructionImages
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork, build_vae
from hdm_lightning.training.optimization.learning_rates import warmup_cosine

CONFIG = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "sample_size": 16,
}
SCHEDULE = partial(warmup_cosine, samples=96, samples_per_step=8, warmup_samples=16)


@pytest.fixture
def module():
    """Function that gives a new module, the same at every call; with a discriminator if wanted."""

    def build(adversarial=False, **changes):
        torch.manual_seed(0)
        vae, discriminator = build_vae(CONFIG), PatchDiscriminator(8, 1) if adversarial else None
        settings = {"learning_rate": 2e-3, "lr_scheduler": SCHEDULE, "kl_weight": 1e-2, "seed": 3}
        settings |= {"scale_numerators": (4, 5, 6, 7), "scale_denominator": 8, "patch_px": 8, "patch_samples": 8}
        if adversarial:
            settings |= {"accumulation": 2, "gradient_clip": 1.0, "adversarial_start_samples": 16}
            settings |= {"discriminator_lr_scheduler": SCHEDULE}
        return AutoencoderModule(vae, discriminator=discriminator, **(settings | changes))

    return build


@pytest.fixture
def images(shard_data):
    """The data, which need no tokenizer."""
    return partial(shard_data, tokenizer=None)


@pytest.fixture
def fit(trainer):
    """Function that gives a trainer for a module: one with a discriminator accumulates and clips by itself."""

    def build(adversarial=False, **changes):
        own = {"accumulate_grad_batches": 1, "gradient_clip_val": None} if adversarial else {}
        return trainer(**(own | changes))

    return build


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
@pytest.mark.parametrize("dies_after", [5, 7, 8])
def test_killed_and_resumed_equals_uninterrupted(
    module, images, fit, fails_after, note_steps, weights_of, tmp_path, adversarial, dies_after
):
    whole = module(adversarial)
    fit(adversarial).fit(whole, images())
    save = ModelCheckpoint(tmp_path, filename="dead", save_on_exception=True, every_n_train_steps=100)
    build = partial(fit, adversarial, enable_checkpointing=True)
    fails_after(dies_after, lambda fail: build(callbacks=[save, fail]).fit(module(adversarial), images()))
    resumed = module(adversarial)
    run = build(callbacks=[note_steps])
    run.fit(resumed, images(), ckpt_path=tmp_path / "dead.ckpt")
    steps = dies_after // 2
    assert run.global_step == 6 and note_steps.samples(steps) == list(range(8 * steps, 48))
    assert torch.equal(weights_of(resumed), weights_of(whole))
    if adversarial:
        pairs = zip(resumed.discriminator.parameters(), whole.discriminator.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def test_two_processes_and_other_micro_batches_take_the_same_steps(
    module, images, trainer, on_processes, weights_of, tmp_path
):
    """Six steps of eight samples: on one process; three on two, then three in a single micro-batch."""
    whole = module()
    trainer().fit(whole, images())

    def first_half(**processes):
        run = trainer(max_steps=3, accumulate_grad_batches=2, **processes)
        run.fit(module(), images(2))
        run.save_checkpoint(tmp_path / "three.ckpt")

    on_processes(2, first_half)
    second = module()
    trainer(accumulate_grad_batches=1).fit(second, images(8), ckpt_path=tmp_path / "three.ckpt")
    torch.testing.assert_close(weights_of(second), weights_of(whole), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
def test_its_metrics_are_those_of_the_images(module, images, fit, adversarial):
    """PSNR and the encoder's equivariance, written out over the ten samples that count."""
    trained, run = module(adversarial, lr_scheduler=None), fit(adversarial)
    run.fit(trained, images())
    logged = set(run.callback_metrics)
    assert {"train/loss", "train/reconstruction", "train/pixel", "train/kl", "lr", "val/psnr"} <= logged
    assert ("train/discriminator" in logged) == ("train/adaptive_weight" in logged) == adversarial
    (measured,) = run.validate(trained, images())
    network, pixels = trained.network, torch.cat([batch["image"] for batch in images().val_dataloader()])[:10]
    image = pixels.float() / 127.5 - 1
    with torch.no_grad():
        mean = network.posterior(image).mean
        errors = ((network.decode(mean).clamp(-1, 1) - image) / 2).numpy().astype(np.float64) ** 2
        turned = [
            relative(mean.rot90(k, (-2, -1)), network.posterior(image.rot90(k, (-2, -1))).mean) for k in (1, 2, 3)
        ]
        scales = [Scale.uniform(scale) for scale in exact_scales(8, (1, 2, 3), 4)]
        scaled = [relative(scale(mean), network.posterior(scale(image, 2)).mean) for scale in scales]
    assert measured["val/psnr"] == pytest.approx(np.mean(-10 * np.log10(errors.mean((1, 2, 3)))), rel=1e-5)
    assert measured["val/equivariance_rotation"] == pytest.approx(np.mean(turned), rel=1e-5)
    assert measured["val/equivariance_scale"] == pytest.approx(np.mean(scaled), rel=1e-5)


def test_the_losses_of_the_samples_have_the_trained_loss_as_their_mean(module, images, fit):
    pairs = []
    note = LambdaCallback(
        on_train_batch_end=lambda trainer, trained, outputs, batch, place: pairs.append(
            ((outputs["sample_losses"] * batch["weight"]).mean().item(), outputs["loss"].item())
        )
    )
    trained = module(True, adversarial_start_samples=0, adversarial_weight=0.1)
    fit(True, callbacks=[note], limit_val_batches=0).fit(trained, images())
    assert len(pairs) == 12 and all(mean == pytest.approx(loss, rel=1e-4, abs=1e-6) for mean, loss in pairs)


def relative(value, reference):
    difference, scale = ((each.flatten(1).double() ** 2).sum(1).sqrt() for each in (value - reference, reference))
    return (difference / scale).mean().item()


@pytest.mark.parametrize(
    ("own", "of_trainer", "where"),
    [
        ({}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ({}, {"gradient_clip_val": 1.0}, "gradient_clip_val"),
        (None, {}, "accumulation"),
    ],
)
def test_what_the_trainer_cannot_do_for_it_is_refused_by_name(module, images, trainer, own, of_trainer, where):
    built = module(accumulation=2) if own is None else module(True)
    settings = {"accumulate_grad_batches": 1, "gradient_clip_val": None} | of_trainer
    with pytest.raises(UserError, match="accumulat") as mistake:
        trainer(**settings).fit(built, images())
    assert where in mistake.value.where


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
def test_it_loads_from_a_checkpoint_by_its_plain_fields(module, images, fit, weights_of, tmp_path, adversarial):
    trained, run = module(adversarial), fit(adversarial)
    run.fit(trained, images())
    run.save_checkpoint(tmp_path / "last.ckpt")
    (measured,) = run.validate(trained, images())
    loaded = AutoencoderModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.discriminator is None and torch.equal(weights_of(loaded), weights_of(trained))
    assert fit().validate(loaded, images()) == [measured]
    if adversarial:
        again = AutoencoderModule.load_from_checkpoint(tmp_path / "last.ckpt", discriminator=PatchDiscriminator(8, 1))
        assert again.accumulation == 2
    other = build_vae(CONFIG | {"layers_per_block": 2})
    with pytest.raises(RuntimeError, match="Missing key"):
        AutoencoderModule.load_from_checkpoint(tmp_path / "last.ckpt", autoencoder=other)


def test_the_report_and_the_images_are_of_the_average(module, images, fit, tmp_path):
    """An average that never moves is the network of the beginning."""
    first, report, logger = module(), AutoencoderReport(), TensorBoardLogger(tmp_path, "tb")
    fit(callbacks=[report]).validate(first, images())
    of_the_beginning, latents = report.measures, report.latents
    drawn = ReconstructionImages(count=3, folder=tmp_path / "drawn")
    averages = WeightAverages([1e12], ramp=0.0)
    trained = module()
    run = fit(callbacks=[averages, report, drawn], logger=logger)
    run.fit(trained, images())
    assert report.measures == pytest.approx(of_the_beginning, rel=1e-5)
    assert report.latents.mean == pytest.approx(latents.mean, rel=1e-5)
    assert float(run.callback_metrics["val/psnr"]) == pytest.approx(
        of_the_beginning["reconstruction/psnr_db"], rel=1e-5
    )
    files = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in files] == [f"{seen:012d}.png" for seen in (0, 16, 32, 48)]
    sheets = [np.asarray(Image.open(path)) for path in files]
    assert all(np.array_equal(sheets[0], sheet) for sheet in sheets) and sheets[0].shape[1] == 3 * 16
    fit(callbacks=[report]).validate(trained, images())
    assert report.measures["reconstruction/psnr_db"] != pytest.approx(of_the_beginning["reconstruction/psnr_db"])


def test_an_encoder_that_is_not_trained_stays_as_it_was(images, fit):
    torch.manual_seed(0)
    network = AutoencoderNetwork(build_vae(CONFIG), train_encoder=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fit().fit(AutoencoderModule(network, learning_rate=2e-3, equivariant=0.0, downscaled=0.0), images())
    moved = {name.split(".")[1] for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"decoder", "post_quant_conv"}
