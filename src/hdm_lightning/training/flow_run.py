"""The recipe of `hdm-train`: check, build, train and export a network."""

import math
import shlex
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.samples import stream
from hdm_lightning.encoders.base import TextEncoder, compile_encoders
from hdm_lightning.encoders.caches import CachedTextEncoder
from hdm_lightning.encoders.pretrained import TextEncoderSource, lies_here
from hdm_lightning.encoders.text_whitening import TextWhitening, WhitenedTextEncoder
from hdm_lightning.errors import UserError
from hdm_lightning.generation.stored_pipeline import save_final
from hdm_lightning.interop.adapter_files import is_on_hub, write_adapter_folder
from hdm_lightning.models import XUT
from hdm_lightning.training import flow_checks, run_folder
from hdm_lightning.training.base_model import kept_name
from hdm_lightning.training.callbacks.keep_ledger import Ledger
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.callbacks.throughput import stage_flops
from hdm_lightning.training.checkpoint_io import read_checkpoint
from hdm_lightning.training.composition import build, plain
from hdm_lightning.training.flow_checks import OF_THE_ENCODER, OF_THE_VAE
from hdm_lightning.training.hub_upload import Hub, upload
from hdm_lightning.training.initial_weights import InitReport, load_initial_weights, record_init, require_whole
from hdm_lightning.training.loggers import FOLDER, Layout, flat_settings, flow_layout, write_row
from hdm_lightning.training.model_record import sampling_of, trained_weights, training_record, write_samples
from hdm_lightning.training.modules.adapted_layers import is_adapted
from hdm_lightning.training.modules.draws import sub_seed
from hdm_lightning.training.modules.low_rank import adapter_of
from hdm_lightning.training.recorded import recorded_values
from hdm_lightning.training.run_log import say
from hdm_lightning.training.run_recipe import COMMON, Recipe, Run, group, with_stage
from hdm_lightning.training.stages import Guard, Hardware, Schedule, StagePlan, Validation, plan_stages
from hdm_lightning.training.strategies import float8, processes
from hdm_lightning.training.strategies.parallelize import prepare_network
from hdm_lightning.training.strategies.sharded_tensors import load_weights
from hdm_lightning.whole_files import write_bytes

CAPTIONS_AT_ONCE = 256
PROJECTION = ("text_projection.weight", "text_projection.bias")


def run_whitening(
    run_dir: Path, captions: int, encoder: TextEncoder, samples: StreamConfig, device: torch.device
) -> TextWhitening:
    """Return the run's whitening.

    The first process measures it, again at every start until a checkpoint has been trained with it: until then the
    encoder or the captions may change.

    Args:
        run_dir: the run's folder.
        captions: number of captions to measure.
        encoder: the text encoder, with its tokenizer.
        samples: the first stage's training stream; captions are taken in its order.
        device: where to encode them.
    """
    path = run_dir / run_folder.WHITENING
    trained_on = any(run_dir.glob("*/checkpoints/step-*.ckpt"))
    if processes.rank() == 0 and not (trained_on and path.exists()):
        say(f"measuring the text encoder's states on {captions:,} captions for whitening")
        write_bytes(path, _measure(captions, encoder, samples, device).to_bytes())
    processes.barrier()
    return TextWhitening.load(path)


def folded(state: dict[str, Tensor], whitening: TextWhitening | None) -> dict[str, Tensor]:
    """Return a network's state dict for whitened states converted to plain states."""
    if whitening is None:
        return state
    return {**state, **dict(zip(PROJECTION, whitening.fold(*(state[name] for name in PROJECTION)), strict=True))}


def _measure(captions: int, encoder: TextEncoder, samples: StreamConfig, device: torch.device) -> TextWhitening:
    encoder.to(device)
    tokenizer: Any = encoder.tokenizer
    # The training itself will record the bad samples.
    read = stream(replace(samples, quarantine=None), tokenizer.bind(samples.context_length), stop=captions)
    rows: list[Tensor] = []
    found = ((sample.tokens, sample.length) for sample in read if sample.weight)
    while batch := list(islice(found, CAPTIONS_AT_ONCE)):
        rows.append(_states(encoder, batch, device))
    return TextWhitening.measure(torch.cat(rows))


@torch.no_grad()
def _states(encoder: TextEncoder, batch: list[tuple[list[int], int]], device: torch.device) -> Tensor:
    """Return the states (N,D) of the captions' tokens, without padding."""
    tokens = torch.tensor([one for one, _ in batch], device=device)
    lengths = torch.tensor([length for _, length in batch], device=device)
    states = encoder.encode(tokens, lengths)
    real = torch.arange(tokens.shape[1], device=device) < lengths.unsqueeze(1)
    return states[real].float().cpu()


class FlowRecipe(Recipe):
    """Training of one network by flow matching, in one or more stages."""

    groups: ClassVar[dict[str, type[Any]]] = {
        "validation": Validation,
        "guard": Guard,
        "hardware": Hardware,
        "schedule": Schedule,
        "hub": Hub,
    }
    others = (*COMMON, "init", "model", "adapter", "text_encoder", "vae")
    of_vae = False

    def plans(self, config: DictConfig, world_size: int) -> list[StagePlan]:
        """Return the stages of `schedule`."""
        return plan_stages(group(config, self, "schedule"), world_size)

    def check(self, config: DictConfig, plans: list[StagePlan]) -> None:
        """See `flow_checks`."""
        flow_checks.check(config, plans)

    # Building

    def build(self, run: Run) -> nn.Module:
        """Build the encoders, the whitening and the network."""
        config = with_stage(run.config, run.plans[0])
        if processes.rank() == 0:
            say(f"loading the text encoder {config.text_encoder.name} and the autoencoder {config.vae.name}")
        text = build(config, "text_encoder", own=OF_THE_ENCODER)
        captions = int(plain(config, "text_encoder").get("whiten_captions") or 0)
        whitening = None
        if captions:
            data = build(config, "data", tokenizer=text.tokenizer)
            cuda = config.trainer.accelerator == "cuda"
            device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
            whitening = run_whitening(run.run_dir, captions, text, data.training_stream, device)
            text = WhitenedTextEncoder(text, whitening)
        cached = int(plain(config, "text_encoder").get("cache_size") or 0)
        run.parts["text_encoder"] = CachedTextEncoder(text, cached) if cached else text
        run.parts["autoencoder"] = build(config, "vae", own=OF_THE_VAE)
        run.parts["whitening"] = whitening
        # Checkpoints contain no frozen weights, so a network with an adapter gets them here.
        return fresh_network(run.config) if run.config.get("adapter") is None else first_network(run.config)[0]

    def begin(self, run: Run) -> None:
        """Load fresh weights, or those of `init`, the same in every process, also when the first stage starts over."""
        network, report = first_network(run.config, run.parts["whitening"])
        if report is not None and processes.rank() == 0 and "init" not in run.parts:
            say(report)
            record_init(run.run_dir, report)
        run.parts["init"] = report
        load_weights(run.network, network.state_dict())

    def module_arguments(self, run: Run, plan: StagePlan) -> dict[str, Any]:
        """Return the network, prepared for the stage, and the encoders."""
        compiled = bool(plain(run.config, "hardware.compile"))
        if isinstance(run.network, XUT):
            recomputed = plan.settings.activation_checkpointing
            if plain(run.config, float8.WHERE):
                float8.use_float8(run.network)
            prepare_network(run.network, activation_checkpointing=recomputed, compiled=compiled)
        elif compiled:
            run.network.compile()
        parts = run.parts
        if compiled and run.config.trainer.accelerator == "cuda":  # on a CPU the caption lengths vary
            compile_encoders(parts["text_encoder"], parts["autoencoder"])
        return {"network": run.network, "text_encoder": parts["text_encoder"], "autoencoder": parts["autoencoder"]}

    def data_arguments(self, run: Run) -> dict[str, Any]:
        """Return the tokenizer of the text encoder."""
        return {"tokenizer": run.parts["text_encoder"].tokenizer}

    def values(self, run: Run, plan: StagePlan) -> dict[str, Any]:
        """Return the cost of the later stages in samples of this stage, by the network's operations."""
        if not isinstance(run.network, XUT):
            return {"samples_after": float(sum(each.samples for each in run.plans[plan.number :]))}
        factor = run.parts["autoencoder"].factor
        costs = {each.number: stage_flops(run.network.config, each.settings, factor) for each in run.plans}
        later = sum(each.samples * costs[each.number] for each in run.plans[plan.number :])
        return {"samples_after": later / costs[plan.number]}

    def layout(self, config: DictConfig) -> Layout:
        """Return the TensorBoard page of a flow-matching stage."""
        return flow_layout(int(OmegaConf.select(config, "callbacks.loss_by_time.bins") or 8))

    # The end

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        """Return the losses of the last validation: `raw`, and one for each average by its name."""
        metrics = next(each for each in trainer.checkpoint_callbacks if isinstance(each, StageCheckpoint)).metrics
        losses = {name.removeprefix("val/loss"): metrics[name] for name in metrics if name.startswith("val/loss")}
        return {"validation": {name.removeprefix("_") or "raw": value for name, value in losses.items()}}

    def kind(self, run: Run) -> str:
        """Return the name of the network's class."""
        return type(run.network).__name__

    def outcome(self, summary: dict[str, Any]) -> str:
        """Return the loss of the exported weights: the first average, or the raw weights."""
        losses = summary["validation"]
        averaged = next((name for name in losses if name != "raw"), "raw")
        if averaged not in losses:
            return ""
        return f"validation loss {losses[averaged]:.4f}" + ("" if averaged == "raw" else " (averaged weights)")

    def next_command(self, run: Run, folder: str) -> str:
        """Return the command that generates an image with the model."""
        prompts = OmegaConf.select(run.config, "callbacks.sample_images.prompts") or ["a lighthouse at dusk"]
        return f"hdm-sample {shlex.quote(folder)} {shlex.quote(str(prompts[0]))}"

    def export(self, run: Run, checkpoint: Path) -> None:
        """Write the averaged and the raw weights with everything that generation needs."""
        final, hub = run.run_dir / run_folder.FINAL, group(run.config, self, "hub")
        export_pipeline(run, read_checkpoint(checkpoint), run.plans[-1], final)
        write_hparams(run)
        if hub.push is not None and final.is_dir():
            say(f"{run.config.name} is on the hub: {push(run, checkpoint, run.plans[-1], final)}")

    def after_stage(self, run: Run, plan: StagePlan, checkpoint: Path) -> None:
        """Upload the stage's result if configured; a refusal by the hub does not end the training."""
        hub = group(run.config, self, "hub")
        if hub.push is None or hub.at != "stages" or plan is run.plans[-1]:
            return
        try:
            push(run, checkpoint, plan)
        except (UserError, OSError) as error:
            say(f"warning: stage {plan.name} was not uploaded to the hub: {getattr(error, 'what', error)}")


def push(run: Run, checkpoint: Path, plan: StagePlan, written: Path | None = None) -> str:
    """Upload the result of a run after a stage and return the URL of the commit.

    An adapter is exported again for the upload, without this machine's paths. So is a model whose text encoder is on
    this machine; the text encoder is included. The folder of any other model may already be `written`.
    """
    hub = group(run.config, run.recipe, "hub")
    message = f"{run.config.name}: " + ("final" if plan is run.plans[-1] else f"stage {plan.name}")
    if written is not None and not is_adapted(run.network) and not lies_here(plain(run.config, "text_encoder.name")):
        return upload(written, hub, message)
    with TemporaryDirectory(dir=run.run_dir, prefix=".upload-") as folder:
        export_pipeline(run, read_checkpoint(checkpoint), plan, Path(folder), public=hub.push)
        return upload(Path(folder), hub, message)


def fresh_network(config: DictConfig) -> nn.Module:
    """Return the network of a configuration, initialized from the seed, on the CPU."""
    torch.manual_seed(sub_seed(int(config.seed), "weights"))
    network: nn.Module = build(config, "model")
    return network


def first_network(config: DictConfig, whitening: TextWhitening | None = None) -> tuple[nn.Module, InitReport | None]:
    """Return the network that a run starts with, and the report on `init`.

    With `whitening`, a text projection that `init` learned on plain text states is converted to whitened ones.
    """
    network = fresh_network(config)
    if config.get("init") is None:
        return network, None
    report = load_initial_weights(network, config.init)
    if whitening is not None and set(PROJECTION) <= set(report.loaded):
        state = network.state_dict()
        unfolded = whitening.unfold(*(state[name] for name in PROJECTION))
        network.load_state_dict({**state, **dict(zip(PROJECTION, unfolded, strict=True))})
    if config.get("adapter") is not None:
        require_whole(report)
        torch.manual_seed(sub_seed(int(config.seed), "adapter"))
        network = build(config, "adapter")(network)
    return network, report


def export_pipeline(
    run: Run, checkpoint: dict[str, Any], plan: StagePlan, folder: Path, *, public: str | None = None
) -> None:
    """Write a pipeline folder, such as `final/`, from the last checkpoint of a stage; see `export_adapter`."""
    config, last = run.config, plan.settings
    if is_adapted(run.network):
        export_adapter(run, checkpoint, plan, folder, public=public)
        return
    if not isinstance(run.network, XUT):
        say(f"the network is not an XUT: its weights stay in {run.run_dir}'s last checkpoint")
        return
    whitening = run.parts["whitening"]
    raw, averaged = trained_weights(checkpoint)
    raw, averaged = folded(raw, whitening), averaged and folded(averaged, whitening)
    text = plain(config, "text_encoder")
    write_samples(run, plan, folder)
    save_final(
        folder,
        averaged or raw,
        xut=run.network.config,
        text_encoder=TextEncoderSource(text["name"], text["layer"], last.context_length),
        autoencoder=run.parts["autoencoder"],
        raw_state=raw if averaged else None,
        training=training_record(run, plan),
        sampling=sampling_of(run, plan),
        include_text_encoder=public is not None and lies_here(text["name"]),
    )


def export_adapter(
    run: Run, checkpoint: dict[str, Any], plan: StagePlan, folder: Path, *, public: str | None = None
) -> None:
    """Write the folder of a run with an adapter: the adapter alone, and the name of its base.

    `public` is its name on the hub, if it goes there: a local base is then named without its path.
    """
    base = kept_name(str(run.config.init))
    raw, averaged = trained_weights(checkpoint)
    adapter = adapter_of(
        run.network,
        base=base if public is None or is_on_hub(base) else Path(base).name,
        weights=averaged or raw,
        settings={
            "training": training_record(run, plan),
            "sampling": sampling_of(run, plan),
            "context_length": plan.settings.context_length,
        },
    )
    write_adapter_folder(folder, adapter, name=str(run.config.name), found_as=public)


def write_hparams(run: Run) -> None:
    """Write the run's row for TensorBoard's HParams page, replacing an earlier one."""
    done = [run_folder.read_done(run.run_dir, plan) for plan in run.plans]
    book = Ledger(run.run_dir / run_folder.LEDGER, writes=False)
    losses = {name: value for name, value in done[-1]["validation"].items() if math.isfinite(value)}
    outcome = {
        **{f"validation_loss_{name}": value for name, value in losses.items()},
        "samples": float(sum(stage["samples"] for stage in done)),
        **{key: book.spent(key) for key in ("device_hours", "cost_usd")},
    }
    write_row(run.run_dir / FOLDER, flat_settings(recorded_values(run.config)), outcome, int(outcome["samples"]))
