"""Telling in one message how a file's tensors differ from what a network needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

_SHOWN = 8


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError that lists missing, unexpected and mis-shaped tensors, if there are any.

    Args:
        found: the file's tensors.
        wanted: names and shapes of what the network needs.
    """
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    parts = [
        listed("missing", missing),
        listed("unexpected", unexpected),
        listed("mis-shaped", misshaped),
    ]
    if any(parts):
        raise ValueError("the tensors do not fit the network\n" + "\n".join(part for part in parts if part))


def listed(kind: str, names: Sequence[str]) -> str:
    """One line with how many and which, the first ones by name; empty where there are none."""
    if not names:
        return ""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {kind} ({len(names)}): {', '.join(names[:_SHOWN])}{more}"
