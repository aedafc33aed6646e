"""Muon for the hidden matrices of the blocks, AdamW for all other parameters, in one optimizer.

Shapes: A x B a matrix (rows out, columns in), P the matrices packed in one parameter of P·A x B.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from hdm_lightning.precision import encoder_dtype
from hdm_lightning.training.optimization.learning_rates import ParameterGroup

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd quintic that brings every singular value near 1 in five rounds (Muon, K. Jordan 2024)."""

_BLOCKS = r"(blocks_before|encoder|decoder|blocks_after)\..*"
PACKED = (
    (_BLOCKS + r"_attention\.qkv\.weight", 3),
    (_BLOCKS + r"_attention\.key_value\.weight", 2),
    (_BLOCKS + r"\.feed_forward\.input\.weight", 2),
    (_BLOCKS + r"_attention\.(query|output)\.weight", 1),
    (_BLOCKS + r"\.(feed_forward\.output|memory_projection)\.weight", 1),
)
"""Names of the parameters for Muon, and the number of matrices in each; every matrix is orthogonalized by itself."""

RMS_OF_ADAMW = 0.2
"""Root mean square of an AdamW step at rate 1, to which Muon's is scaled (arXiv 2502.16982, eq. 4)."""


class MuonGroup(ParameterGroup):
    """A parameter group with `parts`, the number of matrices packed in each of its parameters; 0 for AdamW."""

    parts: int


def muon_groups(groups: Iterable[Any]) -> list[MuonGroup]:
    """Split groups into hidden matrices and the rest, with the same rates and decays; a group's own `parts` stay."""
    result: dict[tuple[float, float, int], MuonGroup] = {}
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            rate, decay = group["lr"], group["weight_decay"]
            parts = group["parts"] if "parts" in group else packed_matrices(name)
            empty = MuonGroup(params=[], lr=rate, weight_decay=decay, names=[], parts=parts)
            wanted = result.setdefault((rate, decay, parts), empty)
            wanted["params"].append(parameter)
            wanted["names"].append(name)
    return list(result.values())


def packed_matrices(name: str) -> int:
    """Return the number of hidden matrices packed in the parameter of this name; 0 if AdamW is to train it."""
    return next((parts for pattern, parts in PACKED if re.fullmatch(pattern, name)), 0)


def orthogonalised(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Return the matrices (P, A, B) with their singular values brought near 1 by Newton–Schulz rounds.

    Five rounds bring every singular value above a hundredth of the matrix's norm to between 0.68 and 1.14, which
    trains as well as exact values. Computed in bfloat16 on CUDA devices that support it, else in float32.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(encoder_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(Optimizer):
    """Muon (arXiv 2502.16982, algorithm 1 with Nesterov momentum) and AdamW, by parameter group.

    A Muon step moves a matrix by rate · 0.2·√max(A, B) times the orthogonalized momentum, so that the step's root
    mean square is 0.2 · rate like AdamW's: rates and decays tuned for AdamW carry over.

    Args:
        groups: parameter groups with `names`, as returned by `FlowModule.parameter_groups`; the names decide which of
            the two trains a parameter, or a group's `parts` (see `MuonGroup`), as for another network's matrices.
        betas: AdamW's moment decays.
        eps: AdamW's epsilon.
        momentum: Muon's momentum.
        rounds: Newton–Schulz rounds.
        fused: use one fused kernel for AdamW's part.

    Raises:
        ValueError: momentum is not in [0, 1), or rounds is below 1.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        momentum: Annotated[float, Ge(0), Lt(1)] = 0.95,
        rounds: Annotated[int, Ge(1)] = 5,
        fused: bool = True,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; expected a number in [0, 1)")
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}; expected at least 1")
        # load_state_dict reads `fused` and `capturable` to put the step counts on the device that the kernel needs.
        defaults = {
            "lr": 1e-3,
            "weight_decay": 0.0,
            "parts": 0,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "rounds": rounds,
            "fused": fused,
            "capturable": False,
        }
        split: list[Any] = [*muon_groups(groups)]
        super().__init__(split, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._muon if group["parts"] else self._adamw)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            ahead = gradient.lerp(momentum, group["momentum"])  # Nesterov
            matrices = ahead.unflatten(0, (group["parts"], -1))
            scale = RMS_OF_ADAMW * math.sqrt(max(matrices.shape[-2:]))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(orthogonalised(matrices, group["rounds"]).flatten(0, 1), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                place = parameter.device if group["fused"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
