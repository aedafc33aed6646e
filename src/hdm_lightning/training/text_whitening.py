"""A run's whitening of its text encoder's states: measured once, kept in the run's folder, folded away at the end."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.samples import stream
from hdm_lightning.encoders.base import TextEncoder
from hdm_lightning.encoders.whitening import TextWhitening
from hdm_lightning.training import run_folder
from hdm_lightning.training.strategies import processes
from hdm_lightning.whole_files import write_atomically

CAPTIONS_AT_ONCE = 256
PROJECTION = ("text_projection.weight", "text_projection.bias")


def run_whitening(
    run_dir: Path, captions: int, encoder: TextEncoder, samples: StreamConfig, device: torch.device
) -> TextWhitening | None:
    """The run's whitening, measured by the first process if the run's folder has none; None where it is off.

    Args:
        run_dir: the run's folder.
        captions: how many are measured; 0 turns the whitening off.
        encoder: with the tokenizer of its captions.
        samples: the first stage's training stream, in whose order captions are taken.
        device: where to encode them.
    """
    if not captions:
        return None
    path = run_dir / run_folder.WHITENING
    if processes.rank() == 0 and not path.exists():
        content = _measure(captions, encoder, samples, device).to_bytes()
        write_atomically(path, lambda file: file.write(content))
    processes.barrier()
    return TextWhitening.load(path)


def folded(state: dict[str, Tensor], whitening: TextWhitening | None) -> dict[str, Tensor]:
    """A network's state dict for whitened states as one for plain states."""
    if whitening is None:
        return state
    return {**state, **dict(zip(PROJECTION, whitening.fold(*(state[name] for name in PROJECTION)), strict=True))}


def unfolded(state: dict[str, Tensor], whitening: TextWhitening | None) -> dict[str, Tensor]:
    """A network's state dict for plain states as one for whitened states."""
    if whitening is None:
        return state
    return {**state, **dict(zip(PROJECTION, whitening.unfold(*(state[name] for name in PROJECTION)), strict=True))}


def _measure(captions: int, encoder: TextEncoder, samples: StreamConfig, device: torch.device) -> TextWhitening:
    encoder.to(device)
    tokenizer: Any = encoder.tokenizer
    # The training itself will note the bad ones.
    read = stream(replace(samples, quarantine=None), tokenizer.bind(samples.context_length), stop=captions)
    rows: list[Tensor] = []
    found = ((sample.tokens, sample.length) for sample in read if sample.weight)
    while batch := list(islice(found, CAPTIONS_AT_ONCE)):
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
