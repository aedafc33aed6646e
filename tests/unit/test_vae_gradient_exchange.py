"""The exchange of gradients between processes in adversarial training."""

import pytest
import torch

from hdm_lightning.training.modules import adversarial
from hdm_lightning.training.strategies import processes


@pytest.mark.parametrize(
    ("sizes", "largest", "expected"),
    [
        ([3, 4, 5], 12, [[3, 4, 5]]),
        ([3, 4, 5], 11, [[3, 4], [5]]),
        ([9, 1, 1, 9], 2, [[9], [1, 1], [9]]),
        ([5, 5], 1, [[5], [5]]),
        ([], 4, []),
    ],
)
def test_tensors_are_cut_into_parts_in_their_order(sizes, largest, expected):
    tensors = [torch.full((size,), float(number)) for number, size in enumerate(sizes)]
    parts = list(adversarial.in_parts(tensors, largest))
    assert [[each.numel() for each in part] for part in parts] == expected
    assert [each for part in parts for each in part] == tensors


def test_gradients_become_their_mean_over_processes_in_parts(monkeypatch):
    """The other process has three times this one's gradients, so that the mean is twice them."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (3, 1, 2), (7,))]
    for number, parameter in enumerate(parameters[:3]):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    before = [parameter.grad.clone() for parameter in parameters[:3]]
    exchanged = []

    def summed(values):
        exchanged.append(values.numel())
        return 4 * values

    monkeypatch.setattr(adversarial, "EXCHANGED_NUMBERS", 10)
    monkeypatch.setattr(processes, "distributed", lambda: True)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "summed", summed)
    adversarial.average_gradients(parameters)
    assert exchanged == [10, 6]
    assert all(torch.equal(parameter.grad, 2 * old) for parameter, old in zip(parameters[:3], before, strict=True))
    assert parameters[3].grad is None
