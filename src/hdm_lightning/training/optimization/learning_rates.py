"""Learning rates: a rule sets the rate and weight decay of each parameter, a schedule scales rates by samples seen.

Three rules:

``mup`` (default): "muP with base dim 1" (arXiv 2509.06068; the idea is from arXiv 2203.03466): a matrix has the rate
base / fan_in, a vector base / elements. Two kinds of tensors have a row of their own, since the literal rule's divisor
is meaningless for them: the aspect ratio's Linear(1, D), whose fan_in of 1 would give it the whole base rate, and the
rotary log-frequencies, whose shape would give them base / 32, so that a frequency could move by an octave in fifty
steps. Both act like vectors of the network's width and have the rate base / D. Biases, norm gains, frequencies and the
weight on the scalar input are not decayed.

``published``: the literal rule for every parameter, everything decayed, as in the published training.

``constant``: the base rate for every parameter of any module; matrices are decayed, vectors are not.
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple, TypedDict

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hdm_lightning.models import XUTConfig


class ParameterGroup(TypedDict):
    """A parameter group for `torch.optim`; ``names`` are the parameters' names, in the order of ``params``."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    names: list[str]


class Row(NamedTuple):
    """The divisor of the base rate, and which are decayed, of the parameters whose whole name matches the pattern."""

    pattern: str
    divisor: Literal["fan_in", "width", "one"]
    decayed: Literal["all", "matrices", "none"]


Rule = Literal["mup", "published", "constant"]
RULES: dict[str, tuple[Row, ...]] = {
    "mup": (
        Row(r".*\.log_frequencies", "width", "none"),
        Row(r"aspect_embedding\.input\.weight", "width", "none"),
        Row(r".*\.bias", "fan_in", "none"),
        Row(r".*norm\.weight", "fan_in", "none"),
        Row(r"(patch_embedding|text_projection|output_projection)\.weight", "fan_in", "all"),
        Row(r"(time_embedding\.projection|aspect_embedding\.output)\.weight", "fan_in", "all"),
        Row(r"modulation\.\w+\.(hidden|output)\.weight", "fan_in", "all"),
        Row(r".*\.\w+_attention\.(qkv|query|key_value|output)\.weight", "fan_in", "all"),
        Row(r".*\.feed_forward\.(input|output)\.weight", "fan_in", "all"),
        Row(r".*\.memory_projection\.weight", "fan_in", "all"),
    ),
    "published": (Row(r".*", "fan_in", "all"),),
    "constant": (Row(r".*\.log_frequencies", "one", "none"), Row(r".*", "one", "matrices")),
}
"""Rule name → rows; the first one that matches a parameter's whole name applies."""


def parameter_groups(
    module: nn.Module, base_learning_rate: float, weight_decay: float, *, rule: str = "mup"
) -> list[ParameterGroup]:
    """Return parameter groups, one per (rate, weight decay), with every trainable parameter in exactly one of them.

    Args:
        module: an XUT for ``mup``, which reads its ``config.width``; any module for the other rules.
        base_learning_rate: the stage's rate; the groups' rates follow from the rule.
        weight_decay: AdamW's decay for the parameters that the rule decays.
        rule: a key of `RULES`.

    Returns:
        Plain dicts for `torch.optim`, by decreasing rate; parameters are in the module's order.

    Raises:
        ValueError: the rule is unknown, does not fit the module, or has no row for one of its parameters.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}")
    width = _width(module) if rule == "mup" else 0
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        row = _row(name, rule)
        rate = base_learning_rate / {"fan_in": fan_in(parameter), "width": float(width), "one": 1.0}[row.divisor]
        decayed = row.decayed == "all" or (row.decayed == "matrices" and parameter.dim() > 1)
        decay = weight_decay if decayed else 0.0
        group = groups.setdefault((rate, decay), ParameterGroup(params=[], lr=rate, weight_decay=decay, names=[]))
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, reverse=True)]


def fan_in(parameter: Tensor) -> float:
    """Return the product of all dimensions but the first, such as a matrix's second; for a vector, its elements."""
    return float(parameter.numel() if parameter.dim() < 2 else math.prod(parameter.shape[1:]))


def _row(name: str, rule: str) -> Row:
    for row in RULES[rule]:
        if re.fullmatch(row.pattern, name):
            return row
    raise ValueError(f"no row of the learning-rate rule {rule!r} covers parameter {name!r}; add one")


def _width(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    if not isinstance(config, XUTConfig):
        raise ValueError(f"module is a {type(module).__name__}; the rule 'mup' needs an XUT")
    return config.width


def rate_factor(samples: int, total: int, warmup: int, final_ratio: float) -> float:
    """Return the share of the base rate after `samples`: linear warm-up, then a cosine from 1 to `final_ratio`."""
    if samples < warmup:
        return samples / warmup
    progress = min(1.0, (samples - warmup) / max(1, total - warmup))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    optimizer: Optimizer,
    *,
    samples: int,
    samples_per_step: int,
    warmup_samples: int = 0,
    final_ratio: float = 0.01,
) -> LambdaLR:
    """Return a schedule of a linear warm-up and a cosine, stepped once per optimizer step.

    The step about to be taken counts as seen, so that the first step of a warm-up is not lost at rate 0.

    Args:
        optimizer: the optimizer whose rates are scaled.
        samples: samples at which the cosine ends.
        samples_per_step: samples per optimizer step, all processes together.
        warmup_samples: samples of the warm-up.
        final_ratio: end of the cosine, as a share of the rate; 1 keeps the rate.
    """

    def factor(step: int) -> float:
        return rate_factor((step + 1) * samples_per_step, samples, warmup_samples, final_ratio)

    return LambdaLR(optimizer, factor)
