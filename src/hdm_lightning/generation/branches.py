"""The network's predictions that guidance combines: one branch for each text and routing rate.

Shapes: B pictures, C latent channels, h×w latent, N image tokens, K kept tokens.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdm_lightning.generation.encoded_text import EncodedText, joined
from hdm_lightning.models import XUT
from hdm_lightning.models.routing import keep_from_scores


@dataclass(frozen=True)
class View:
    """What all branches of a batch of pictures share.

    Attributes:
        model: the network.
        positions: (1, N, 2) of the image tokens.
        generators: one for each picture, on the CPU: where its routing comes from.
        autocast: lower precision to compute in, or None.
    """

    model: XUT
    positions: Tensor
    generators: Sequence[torch.Generator]
    autocast: torch.dtype | None

    def keep(self, rate: float) -> Tensor | None:
        """Image tokens (B, K) that pass through the U, drawn anew; None at rate 0, the dense network."""
        if rate == 0.0:
            return None
        tokens = self.positions.shape[1]
        scores = torch.stack([torch.rand(tokens, generator=generator) for generator in self.generators])
        return keep_from_scores(scores, rate).to(self.positions.device)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """The precision to compute in."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.positions.device.type, dtype=self.autocast)


@dataclass(frozen=True, eq=False)
class Branch:
    """The network's velocity under one text and one routing rate; callable as `diffusion.sampling.Velocity`.

    Attributes:
        view: shared with the other branches of the same pictures.
        text: B prompts.
        rate: share of image tokens that skip the U.
    """

    view: View
    text: EncodedText
    rate: float

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The velocity (B, C, h, w) of this branch alone."""
        return velocities([self], x, t)[0]


def velocities(branches: Sequence[Branch], x: Tensor, t: float) -> list[Tensor]:
    """The velocities (B, C, h, w) of branches at one point, those of equal routing rate in one pass of the network.

    Routing is drawn branch by branch, and texts that are padded to a common length read as if they were not, so that
    the numbers are those of a pass for each branch, but for rounding.
    """
    keeps = [branch.view.keep(branch.rate) for branch in branches]
    found: dict[int, Tensor] = {}
    for rate in dict.fromkeys(branch.rate for branch in branches):
        group = [number for number, branch in enumerate(branches) if branch.rate == rate]
        kept = [keep for number in group if (keep := keeps[number]) is not None]
        together = _one_pass([branches[number] for number in group], torch.cat(kept) if kept else None, x, t)
        found |= dict(zip(group, together.chunk(len(group)), strict=True))
    return [found[number] for number in range(len(branches))]


def _one_pass(branches: Sequence[Branch], keep: Tensor | None, x: Tensor, t: float) -> Tensor:
    """Velocities (branches·B, C, h, w) of branches of one routing rate."""
    view, text = branches[0].view, joined([branch.text for branch in branches])
    repeated = x.repeat(len(branches), 1, 1, 1)
    with view.precision():
        predicted = view.model(
            repeated,
            x.new_full(repeated.shape[:1], t),
            text.context,
            context_lengths=text.lengths,
            token_positions=view.positions,
            keep=keep,
        )
    return predicted.to(x.dtype)
