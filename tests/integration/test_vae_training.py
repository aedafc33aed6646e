"""The autoencoder's training path at toy size: gradients, ranks, resume, hand-over."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from composed import check_job, composed, done_of, end_of, ledger_of, run_job, saved_in, scalars_of
from crash import crashing_at
from damage import flip_a_bit
from hdm_lightning.autoencoding.branches import Branch, draw_branch
from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.training.autoencoder_run import AutoencoderRecipe, build_discriminator, build_network
from hdm_lightning.training.callbacks.ends import ValidateAtEnds
from hdm_lightning.training.checkpoint_io import network_weights
from hdm_lightning.training.composition import build
from hdm_lightning.training.modules import draws
from hdm_lightning.training.modules.autoencoder_module import NOISE_PURPOSE
from hdm_lightning.training.run_recipe import group, with_stage
from hub import standing_in

ADVERSARIAL = {"weight": 0.5, "start_samples": 16, "channels": 4, "layers": 1, "gradient_clip": 0.0}
# Groups of two channels or more, or the bias before a norm has no gradient; and wide enough that with this seed some
# logits lie outside of [-1, 1], or the hinge's two halves leave the last bias none.
JUDGE = ADVERSARIAL | {"start_samples": 0, "channels": 64}
SEED = 1
# Of the generator's and the discriminator's tensors, each relative to its own size, in float32: five times and more
# what the orders of summation were seen to change (1.7e-5, 1.2e-6).
TOLERANCES = (1e-4, 1e-5)


@pytest.fixture
def config(toy_vae_config):
    return toy_vae_config


@pytest.fixture
def filled_config(config, tmp_path, changed):
    """The same training from an autoencoder with no zero in it, so that every tensor has a gradient at once.

    One from scratch begins with its residual branches at zero, and more than half of its tensors then have none.
    """
    folder, source = tmp_path / "filled", torch.Generator().manual_seed(0)
    vae = AutoencoderKL(**config["autoencoder"]["config"])
    for parameter in vae.parameters():
        deviation = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.data.normal_(0, deviation, generator=source)
    for norm in (module for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)):
        norm.weight.data.add_(1)
    vae.save_pretrained(folder)
    return changed(config, autoencoder={"config": None, "source": str(folder)}, seed=SEED)


def last_checkpoint(config):
    return end_of(config, "01-vae")


def first_moments(config, optimizer=0):
    """The optimizer's mean gradients, one for each tensor of its network."""
    checkpoint = last_checkpoint(config)
    states = checkpoint["optimizer_states"][optimizer]["state"]
    prefix = ("network.", "discriminator.")[optimizer]
    assert len(states) == sum(name.startswith(prefix) for name in checkpoint["state_dict"])
    return [states[number]["exp_avg"] for number in sorted(states)]


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
def test_gradients_are_clipped_in_bfloat16_too(config, adversarial, changed):
    """After one step the first moments are (1 - beta) times the clipped gradient."""
    config = changed(config, stage={"samples": 8, "gradient_clip": 0.001}, trainer={"precision": "bf16-mixed"})
    if adversarial:
        config = changed(config, adversarial=ADVERSARIAL | {"start_samples": 0, "gradient_clip": 0.002})
    assert run_job(check_job(config)) == 0
    for optimizer, largest in enumerate((0.001, 0.002)[: 1 + adversarial]):
        norm = torch.nn.utils.get_total_norm(first_moments(config, optimizer))
        assert float(norm) == pytest.approx(0.5 * largest, rel=1e-3)


def optimizer_order(network):
    """Parameters as the optimizer numbers them: those that are decayed, then the rest."""
    parameters = list(network.parameters())
    return [p for p in parameters if p.ndim > 1] + [p for p in parameters if p.ndim <= 1]


def networks_at_the_start(config):
    """The autoencoder as its folder has it, and the discriminator that the run's seed gives."""
    vae = AutoencoderKL.from_pretrained(config["autoencoder"]["source"], low_cpu_mem_usage=False)
    torch.manual_seed(draws.sub_seed(config["seed"], "vae weights"))
    build_network(group_of(config, "autoencoder"))
    return vae, build_discriminator(group_of(config, "adversarial"))


def group_of(config, name):
    """A group of plain keys, as the training has it."""
    return group(composed(config), AutoencoderRecipe(), name)


def images_of(config):
    """The data module of a training in one process."""
    job = check_job(config)
    stage = with_stage(job.config, job.plans[0], **job.recipe.stage_values(job.config, job.plans[0]))
    return build(stage, "data", tokenizer=None)


def hand_written_step(config, vae, judge):
    """Gradients of one step of both networks, from diffusers' public methods and plain torch alone."""
    seed, data = config["seed"], images_of(config)
    batch = next(iter(data.train_dataloader()))
    draw = draw_branch(group_of(config, "equivariance"), 8, 8, seed=seed, samples_seen=0)
    assert draw.branch is Branch.EQUIVARIANT
    scale, turn = draw.transform.steps
    noise = draws.draw(seed, NOISE_PURPOSE, batch["index"], (3, 8, 8), 0).noise

    def moved(tensor):
        side = int(tensor.shape[-1] * scale.vertical)
        return torch.rot90(F.interpolate(tensor, size=(side, side), mode="bilinear"), turn.turns, (2, 3))

    def forward():
        posterior = vae.encode(batch["image"] / 127.5 - 1).latent_dist
        return posterior, vae.decode(moved(posterior.mean + posterior.std * noise)).sample

    target = moved(batch["image"] / 127.5 - 1)
    posterior, output = forward()
    reconstruction, adversarial = (output - target).abs().mean(), -judge(output).mean()
    last = vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (reconstruction, adversarial)]
    balance = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    loss = reconstruction + 1e-2 * kl + 0.5 * balance * adversarial
    generator = torch.autograd.grad(loss, optimizer_order(vae))

    _, again = forward()
    hinge = 0.5 * (F.relu(1 - judge(target)).mean() + F.relu(1 + judge(again.detach())).mean())
    return generator, torch.autograd.grad(hinge, optimizer_order(judge))


def assert_close(found, expected, relative):
    """No tensor is off by more than `relative` of its own largest element, and none is zero but for rounding.

    Rounding leaves about 1e-7 of what a sum was taken of, the smallest true gradient here is 1e-2 of the largest.
    """
    assert [value.shape for value in found] == [value.shape for value in expected]
    sizes = torch.stack([value.abs().max() for value in expected])
    errors = torch.stack([(one - other).abs().max() for one, other in zip(found, expected, strict=True)])
    assert (sizes / sizes.max()).min() > 1e-3
    assert (errors / sizes).max() < relative


def one_adversarial_step(changed, config, **groups):
    groups = {"stage": {}, "adversarial": {}, "equivariance": {}} | groups
    groups["stage"] = {"samples": 8} | groups["stage"]
    groups["adversarial"] = JUDGE | groups["adversarial"]
    groups["equivariance"] = {"equivariant": 1.0, "downscaled": 0.0} | groups["equivariance"]
    return changed(config, **groups)


def test_both_gradients_equal_two_separate_hand_written_steps(filled_config, changed):
    config = one_adversarial_step(changed, filled_config)
    assert run_job(check_job(config)) == 0
    networks = networks_at_the_start(config)
    generator, discriminator = hand_written_step(config, *networks)
    # The first moment after one step is (1 − β₁) times the gradient.
    assert_close([2 * moment for moment in first_moments(config, 0)], generator, TOLERANCES[0])
    assert_close([2 * moment for moment in first_moments(config, 1)], discriminator, TOLERANCES[1])
    trained = last_checkpoint(config)["state_dict"]
    for prefix, network in zip(("network.vae", "discriminator"), networks, strict=True):
        for name, start in network.named_parameters():
            assert not torch.equal(trained[f"{prefix}.{name}"], start), name


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
def test_two_processes_equal_one_with_twice_the_batch(filled_config, tmp_path, adversarial, changed):
    stage = {"samples": 24, "learning_rate": 1e-5, "gradient_clip": 0.5}
    one = changed(filled_config, stage=stage)
    if adversarial:
        one = one_adversarial_step(changed, one, stage=stage)
    one = changed(one, run_dir=str(tmp_path / "one"), validation={"features": "efficientnet_lite0"})
    two = changed(one, run_dir=str(tmp_path / "two"), stage={"micro_batch_size": 4}, trainer={"devices": 2})
    assert run_job(check_job(one)) == 0
    assert run_job(check_job(two)) == 0
    for optimizer in range(1 + adversarial):
        assert_close(first_moments(two, optimizer), first_moments(one, optimizer), TOLERANCES[optimizer])
    done = [done_of(run, "01-vae") for run in (one, two)]
    kernels = [each["measures"].pop("reconstruction/kernel_efficientnet_lite0") for each in done]
    assert kernels[1] == pytest.approx(kernels[0], rel=0.02)  # on pictures rounded to whole grey levels
    assert done[1]["measures"] == pytest.approx(done[0]["measures"], rel=1e-3)
    assert done[1]["latents"]["std"] == pytest.approx(done[0]["latents"]["std"], rel=1e-4)


def test_accumulation_equals_one_large_batch(filled_config, tmp_path, changed):
    """Over six steps with their branches, the first three on patches."""
    one = changed(filled_config, stage={"learning_rate": 1e-5}, patches={"size_px": 8, "samples": 24},
                  equivariance={"scale_denominator": 4, "scale_numerators": [2, 3]})  # fmt: skip
    branches = group_of(one, "equivariance")
    drawn = [draw_branch(branches, 8, 8, seed=SEED, samples_seen=8 * n) for n in range(6)]
    assert len({draw.branch for draw in drawn}) > 1
    judged = {"adversarial": JUDGE | {"adaptive": False}, "patches": {"size_px": 16}}
    for groups in ({}, judged):
        whole = changed(one, run_dir=str(tmp_path / f"whole{len(groups)}"), **groups)
        parts = changed(whole, run_dir=str(tmp_path / f"parts{len(groups)}"), stage={"micro_batch_size": 2})
        for each in (whole, parts):
            assert run_job(check_job(each)) == 0
        for optimizer in range(1 + ("adversarial" in groups)):
            assert_close(first_moments(parts, optimizer), first_moments(whole, optimizer), TOLERANCES[optimizer])


def test_recomputed_activations_change_no_gradient(filled_config, tmp_path, changed):
    kept = one_adversarial_step(changed, changed(filled_config, run_dir=str(tmp_path / "kept")))
    recomputed = changed(kept, run_dir=str(tmp_path / "recomputed"), stage={"activation_checkpointing": True})
    for each in (kept, recomputed):
        assert run_job(check_job(each)) == 0
    for optimizer in (0, 1):
        assert_close(first_moments(recomputed, optimizer), first_moments(kept, optimizer), 1e-6)


@pytest.mark.slow
def test_a_compiled_network_has_the_same_gradients_and_keys(filled_config, tmp_path, changed):
    eager = one_adversarial_step(changed, changed(filled_config, run_dir=str(tmp_path / "eager")))
    compiled = changed(eager, run_dir=str(tmp_path / "compiled"), hardware={"compile": True})
    for each in (eager, compiled):
        assert run_job(check_job(each)) == 0
    assert last_checkpoint(compiled)["state_dict"].keys() == last_checkpoint(eager)["state_dict"].keys()
    for optimizer in (0, 1):
        assert_close(first_moments(compiled, optimizer), first_moments(eager, optimizer), TOLERANCES[optimizer])


def test_the_discriminator_sets_in_at_its_sample_and_steps_are_counted_once(config, changed):
    config = changed(config, adversarial=ADVERSARIAL | {"start_samples": 16})
    assert run_job(check_job(config)) == 0
    checkpoint = last_checkpoint(config)
    assert (checkpoint["global_step"], checkpoint["hdm"]["samples"]) == (6, 48)
    steps = [
        {int(state["step"]) for state in checkpoint["optimizer_states"][number]["state"].values()} for number in (0, 1)
    ]
    assert steps == [{6}, {4}]


@pytest.mark.parametrize(
    ("adversarial", "micro_batch"), [(False, 8), (False, 4), (True, 4)], ids=["plain", "accumulated", "adversarial"]
)
def test_killed_and_resumed_equals_uninterrupted(config, tmp_path, monkeypatch, adversarial, micro_batch, changed):
    config = changed(config, stage={"micro_batch_size": micro_batch})
    if adversarial:
        config = changed(config, adversarial=ADVERSARIAL)
    config = changed(config, patches={"size_px": 8, "samples": 24}, equivariance={"scale_denominator": 4,
                     "scale_numerators": [2, 3]})  # fmt: skip
    if adversarial:
        config = changed(config, patches={"size_px": 16})
    whole = changed(config, run_dir=str(tmp_path / "whole"))
    assert run_job(check_job(whole)) == 0
    for step in (1, 3, 6):
        with crashing_at(step):
            run_job(check_job(config))
    assert run_job(check_job(config)) == 0
    for name in ("network", "discriminator") if adversarial else ("network",):
        expected = {k: v for k, v in last_checkpoint(whole)["state_dict"].items() if k.startswith(name)}
        got = last_checkpoint(config)["state_dict"]
        assert expected and all(torch.equal(got[key], value) for key, value in expected.items())
    exported = [load_file(Path(c["run_dir"]) / "final/diffusion_pytorch_model.safetensors") for c in (whole, config)]
    assert all(torch.equal(exported[1][key], value) for key, value in exported[0].items())


def test_a_damaged_end_is_trained_over_from_the_checkpoint_before(config, capsys):
    assert run_job(check_job(config)) == 0
    whole, newest = last_checkpoint(config)["state_dict"], saved_in(config, "01-vae")[-1]
    flip_a_bit(newest)
    assert run_job(check_job(config)) == 0
    assert f"{newest} is damaged (the checksum of" in capsys.readouterr().out
    again = last_checkpoint(config)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_what_a_stopped_run_has_spent_stands_in_the_ledger(config, monkeypatch, changed):
    original = ValidateAtEnds.on_step_end

    def stop(self, trainer, module, at):
        original(self, trainer, module, at)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ValidateAtEnds, "on_step_end", stop)
    assert run_job(check_job(changed(config, stage={"save_every": 0}))) == 143
    events = ledger_of(config)
    assert [event["event"] for event in events] == ["start", "progress", "stop"]  # in between the checkpoint it saves
    assert events[-1]["samples"] == 8 and events[-1]["seconds"] > 0


@pytest.mark.parametrize("quant_conv", [False, True], ids=["flux", "sd"])
def test_an_autoencoder_of_sixteen_channels_is_fine_tuned_from_its_folder(config, tmp_path, quant_conv, changed):
    folder = tmp_path / "source"
    fields = {
        **config["autoencoder"]["config"],
        "latent_channels": 16,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
    }
    AutoencoderKL(**fields, scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(folder)
    config = changed(config, autoencoder={"config": None, "source": str(folder)}, stage={"samples": 16})
    assert run_job(check_job(config)) == 0
    written = json.loads((Path(config["run_dir"]) / "final" / "config.json").read_text())
    assert len(written["latents_mean"]) == len(written["latents_std"]) == written["latent_channels"] == 16
    assert (written["scaling_factor"], written["shift_factor"]) == (1.0, None)
    frozen = load_autoencoder(str(Path(config["run_dir"]) / "final"))
    assert frozen.std.flatten().tolist() == pytest.approx(written["latents_std"])


def test_what_is_handed_over_is_read_by_diffusers_and_by_training(config):
    assert run_job(check_job(config)) == 0
    folder = Path(config["run_dir"]) / "final"
    vae = AutoencoderKL.from_pretrained(str(folder), low_cpu_mem_usage=False)
    checkpoint = last_checkpoint(config)
    averages = checkpoint["callbacks"]["WeightAverages"]["shadows"][0]
    for name, value in vae.state_dict().items():
        assert torch.equal(value, averages[f"vae.{name}"])
    assert any(not torch.equal(averages[name], value) for name, value in network_weights(checkpoint).items())

    data = images_of(config)
    images = torch.cat([batch["image"] for batch in data.val_dataloader()]).float() / 127.5 - 1
    frozen = load_autoencoder(str(folder))
    latent = frozen.encode(images)
    assert latent.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(latent.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-3, atol=0)
    measured = json.loads((folder / "measures.json").read_text())
    error = (frozen.decode(latent) - images).abs().mean().item()
    assert measured["measures"]["reconstruction/l1"] == pytest.approx(error, rel=1e-4)
    assert "EQ-VAE" in (folder / "README.md").read_text()


def test_fine_tuning_the_decoder_alone_keeps_the_latent_space(config, tiny_autoencoder, changed):
    config = changed(
        config,
        autoencoder={"config": None, "source": str(tiny_autoencoder), "train_encoder": False},
        equivariance={"scale_denominator": 4, "scale_numerators": [2, 3]},
        stage={"gradient_clip": 1.0},
    )
    assert run_job(check_job(config)) == 0
    before = load_file(tiny_autoencoder / "diffusion_pytorch_model.safetensors")
    final = Path(config["run_dir"]) / "final"
    after = load_file(final / "diffusion_pytorch_model.safetensors")
    same = {name: torch.equal(after[name], value) for name, value in before.items()}
    assert all(same[name] for name in before if name.startswith(("encoder", "quant_conv")))
    assert not any(same[name] for name in before if name.startswith(("decoder.conv", "post_quant_conv")))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tiny_autoencoder, final)]
    for key in ("latents_mean", "latents_std", "scaling_factor", "shift_factor"):
        assert configs[1][key] == configs[0][key]
    assert "unchanged from the source of the frozen encoder" in (final / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_with_one_validation_picture_agree(config, changed):
    config = changed(config, trainer={"devices": 2}, stage={"samples": 8, "micro_batch_size": 4})
    assert run_job(check_job(changed(config, validation={"samples": 1}))) == 0
    measured = json.loads((Path(config["run_dir"]) / "final" / "measures.json").read_text())
    assert measured["images"] == 1 and math.isfinite(measured["measures"]["reconstruction/ssim"])


def test_a_perceptual_distance_is_reported_without_being_trained_on(config, changed):
    config = changed(config, stage={"samples": 8}, validation={"perceptual_network": "efficientnet_lite0"})
    assert run_job(check_job(config)) == 0
    measured = json.loads((Path(config["run_dir"]) / "final" / "measures.json").read_text())["measures"]
    assert measured["reconstruction/efficientnet_lite0"] > 0


def test_progress_is_counted_in_samples_and_measures_are_written(config, changed):
    assert run_job(check_job(changed(config, stage={"validate_every": 24}))) == 0
    assert [event.step for event in scalars_of(config, "train/pixel", "01-vae")] == [16, 32, 48]
    measured = scalars_of(config, "equivariance/encoder_rotation", "01-vae")
    assert [event.step for event in measured] == [0, 24, 48]
    assert all(math.isfinite(event.value) for event in measured)


def test_the_result_is_pushed_without_the_places_of_this_machine(config, changed, tmp_path):
    pushed = changed(config, hub={"push": "me/vae", "license": "apache-2.0"})
    source = tmp_path / "source"
    AutoencoderKL(**config["autoencoder"]["config"]).save_pretrained(source)
    pushed = changed(pushed, autoencoder={"config": None, "source": str(source)})
    with standing_in(tmp_path / "cache") as hub:
        assert run_job(check_job(pushed)) == 0
        final = Path(pushed["run_dir"]) / "final"
        held = hub.files["me/vae"]
        assert (
            held["diffusion_pytorch_model.safetensors"] == (final / "diffusion_pytorch_model.safetensors").read_bytes()
        )
        texts = {name: content.decode() for name, content in held.items() if not name.endswith("safetensors")}
        assert not [name for name, text in texts.items() if str(tmp_path) in text or pushed["run_dir"] in text]
        assert 'from_pretrained("me/vae")' in texts["README.md"] and "license: apache-2.0" in texts["README.md"]
        hub.refuses = True
        other = changed(pushed, hub={"push": "me/other"}) | {"run_dir": str(tmp_path / "other")}
        with pytest.raises(UserError, match="the hub refused"):
            run_job(check_job(other))
    with pytest.raises(UserError, match="OWNER/NAME"):
        check_job(changed(config, hub={"push": "vae"}))
