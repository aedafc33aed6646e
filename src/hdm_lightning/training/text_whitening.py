"""A run's whitening of its text encoder's states: measured once, kept in the run's folder, folded away at the end."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from hdm_lightning.data.streaming import stream
from hdm_lightning.encoders.base import TextEncoder
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.encoders.whitening import TextWhitening
from hdm_lightning.training import processes, run_folder
from hdm_lightning.training.data_settings import training_stream
from hdm_lightning.training.settings import TrainSettings
from hdm_lightning.training.stages import StagePlan
from hdm_lightning.whole_files import write_atomically

CAPTIONS_AT_ONCE = 256
PROJECTION = ("text_projection.weight", "text_projection.bias")


def run_whitening(settings: TrainSettings, plan: StagePlan, device: torch.device) -> TextWhitening | None:
    """The run's whitening, measured by the first process if the run's folder has none; None where it is off.

    Args:
        settings: the run's; `text_encoder.whiten_captions` captions are measured.
        plan: the first stage, in whose order captions are taken.
        device: where to encode them.
    """
    if not settings.text_encoder.whiten_captions:
        return None
    path = Path(settings.run_dir) / run_folder.WHITENING
    if processes.rank() == 0 and not path.exists():
        content = _measure(settings, plan, device).to_bytes()
        write_atomically(path, lambda file: file.write(content))
    processes.barrier()
    return TextWhitening.load(path)


def folded(state: dict[str, Tensor], whitening: TextWhitening | None) -> dict[str, Tensor]:
    """A network's state dict for white states as one for plain states."""
    if whitening is None:
        return state
    return {**state, **dict(zip(PROJECTION, whitening.fold(*(state[name] for name in PROJECTION)), strict=True))}


def unfolded(state: dict[str, Tensor], whitening: TextWhitening | None) -> dict[str, Tensor]:
    """A network's state dict for plain states as one for white states."""
    if whitening is None:
        return state
    return {**state, **dict(zip(PROJECTION, whitening.unfold(*(state[name] for name in PROJECTION)), strict=True))}


def _measure(settings: TrainSettings, plan: StagePlan, device: torch.device) -> TextWhitening:
    text = settings.text_encoder
    encoder = load_text_encoder(
        text.name,
        dtype=text.dtype,
        layer=text.layer,
        max_tokens=text.max_tokens,
    ).to(device)
    tokenize = Tokenizer(text.name).bind(plan.settings.context_length)
    captions_only = replace(training_stream(settings, plan), quarantine=None)  # training itself will note the bad ones
    samples = stream(captions_only, tokenize, stop=text.whiten_captions)
    rows: list[Tensor] = []
    captions = ((sample.tokens, sample.length) for sample in samples if sample.weight)
    while batch := list(islice(captions, CAPTIONS_AT_ONCE)):
        rows.append(_states(encoder, batch, device))
    return TextWhitening.measure(torch.cat(rows))


@torch.no_grad()
def _states(encoder: TextEncoder, batch: list[tuple[list[int], int]], device: torch.device) -> Tensor:
    """States (N,D) of the true tokens of captions."""
    tokens = torch.tensor([one for one, _ in batch], device=device)
    lengths = torch.tensor([length for _, length in batch], device=device)
    states = encoder.encode(tokens, lengths)
    real = torch.arange(tokens.shape[1], device=device) < lengths.unsqueeze(1)
    return states[real].float().cpu()
