"""TREAD's choice of tokens, its way there and back, and what it saves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.routing import (
    gather_tokens,
    keep_from_scores,
    random_keep,
    scatter_tokens,
    with_text,
)
from hdm_lightning.profiling.operations import Workload, forward_flops
from toy_run import filled_network

CONFIG = XUTConfig(width=32, mlp_width=48, heads=2, head_dim=16, context_width=12, depth=2, decoder_blocks=2)


def filled() -> XUT:
    return filled_network(CONFIG)


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 5), tokens=st.integers(1, 70), rate=st.floats(0, 0.999), seed=st.integers(0, 2**31))
def test_kept_tokens_are_distinct_ascending_and_as_many_as_the_formula(
    batch: int, tokens: int, rate: float, seed: int
) -> None:
    keep = random_keep(batch, tokens, rate, torch.Generator().manual_seed(seed))
    assert keep.dtype == torch.int64
    assert keep.shape == (batch, tokens - int(rate * tokens))
    assert ((keep >= 0) & (keep < tokens)).all()
    assert (keep.diff(dim=1) > 0).all()


def test_every_token_is_kept_equally_often_and_pairs_are_independent() -> None:
    keep = random_keep(20_000, 8, 0.5, torch.Generator().manual_seed(1))
    chosen = torch.zeros(20_000, 8).scatter(1, keep, 1.0)
    share, pairs = chosen.mean(0), chosen.T @ chosen / 20_000
    assert (share - 0.5).abs().max() < 0.015
    off_diagonal = pairs[~torch.eye(8, dtype=torch.bool)]
    assert (off_diagonal - 4 / 8 * 3 / 7).abs().max() < 0.015


def test_the_generator_alone_decides() -> None:
    first, again = (random_keep(3, 50, 0.3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, random_keep(3, 50, 0.3, torch.Generator().manual_seed(8)))


def test_scores_of_a_sample_choose_alike_in_any_batch() -> None:
    scores = torch.rand(6, 40, generator=torch.Generator().manual_seed(2))
    whole = keep_from_scores(scores, 0.5)
    assert torch.equal(whole, torch.cat([keep_from_scores(part, 0.5) for part in scores.split(2)]))
    assert torch.equal(whole[0], scores[0].argsort(descending=True)[:20].sort().values)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_outside_its_range_is_named(rate: float) -> None:
    with pytest.raises(ValueError, match="rate is"):
        random_keep(2, 8, rate)


def test_gather_and_scatter_undo_each_other() -> None:
    sequence = torch.randn(2, 9, 3)
    indices = with_text(torch.tensor([[0, 4], [2, 5]]), tokens=6, text=3)
    assert indices.tolist() == [[0, 4, 6, 7, 8], [2, 5, 6, 7, 8]]
    gathered = gather_tokens(sequence, indices)
    assert torch.equal(gathered[1], sequence[1, [2, 5, 6, 7, 8]])
    assert torch.equal(scatter_tokens(sequence, indices, gathered), sequence)
    changed = scatter_tokens(sequence, indices, gathered + 1)
    assert torch.equal(changed[0, [1, 2, 3, 5]], sequence[0, [1, 2, 3, 5]])
    assert torch.equal(changed[0, [0, 4, 6, 7, 8]], sequence[0, [0, 4, 6, 7, 8]] + 1)


class Operations(TorchDispatchMode):
    """Notes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_way_there_and_back_has_the_gradients_of_torch_s_own_and_adds_none_up() -> None:
    draw = torch.Generator().manual_seed(0)
    indices = with_text(random_keep(3, 12, 0.5, draw), tokens=12, text=4)
    sequence, probe, other = (torch.randn(3, 16, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    sequence.requires_grad_()
    rows = indices.unsqueeze(-1).expand(-1, -1, 5)
    plain = sequence.gather(1, rows)
    expected = torch.autograd.grad((other.scatter(1, rows, plain.sin()) * probe).sum(), sequence)
    with Operations() as operations:
        found = torch.autograd.grad(
            (scatter_tokens(other, indices, gather_tokens(sequence, indices).sin()) * probe).sum(), sequence
        )
    assert torch.equal(found[0], expected[0])
    assert found[0].abs().sum() > 0
    assert not any("scatter_add" in name or "index_add" in name or "index_put" in name for name in operations.seen)


def test_gathering_has_derivatives_of_any_order_and_from_one_row_for_all() -> None:
    indices = torch.tensor([[0, 3, 1], [4, 2, 3]])
    one = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, indices), one)
    assert torch.autograd.gradgradcheck(lambda x: gather_tokens(x.square(), indices), one)


def test_rate_zero_is_exactly_the_dense_path() -> None:
    model = filled()
    latent, t, context = torch.randn(2, 4, 8, 8).double(), torch.rand(2).double(), torch.randn(2, 3, 12).double()
    dense = model(latent, t, context)
    assert torch.equal(model(latent, t, context, keep=random_keep(2, 16, 0.0)), dense)
    assert torch.equal(model(latent, t, context, keep=torch.ones(2, 16, dtype=torch.bool)), dense)
    routed = model(latent, t, context, keep=random_keep(2, 16, 0.5, torch.Generator().manual_seed(0)))
    assert (routed - dense).abs().max() > 1e-3


def test_only_kept_tokens_and_all_text_enter_the_u() -> None:
    model, seen = filled(), {}
    model.blocks_before[0].register_forward_hook(lambda _m, _i, out: seen.update(before=out))
    model.encoder[0][0].register_forward_pre_hook(lambda _m, args: seen.update(inside=args))
    model.decoder[-1][-1].register_forward_hook(lambda _m, _i, out: seen.update(routed=out))
    model.blocks_after[0].register_forward_pre_hook(lambda _m, args: seen.update(after=args[0]))
    keep = torch.tensor([[1, 6, 9], [0, 3, 15]])
    context, positions = torch.randn(2, 5, 12).double(), torch.randn(2, 16, 2).double()
    model(torch.randn(2, 4, 8, 8).double(), torch.rand(2).double(), context, keep=keep, token_positions=positions)
    for row in range(2):
        places = [*keep[row].tolist(), *range(16, 21)]
        others = [i for i in range(16) if i not in places]
        assert torch.equal(seen["inside"][0][row], seen["before"][row, places])
        assert torch.equal(seen["inside"][1][row, :3], positions[row, keep[row]])
        assert torch.equal(seen["inside"][1][row, 3:], torch.zeros(5, 2).double())
        assert torch.equal(seen["after"][row, places], seen["routed"][row])
        assert torch.equal(seen["after"][row, others], seen["before"][row, others])


@pytest.mark.parametrize(("rate", "text"), [(0.0, 0), (0.25, 5), (0.5, 7), (0.75, 32)])
def test_operations_fall_as_the_formula_says(rate: float, text: int) -> None:
    model, work = filled().float(), Workload.of(CONFIG, 16, 12, text, rate=rate)
    latent, t, context = torch.randn(2, 4, 16, 12), torch.rand(2), torch.randn(2, text, 12)
    keep = random_keep(2, 48, rate, torch.Generator().manual_seed(0))
    # The counter knows the plain form of attention only, on a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(latent, t, context, keep=keep)
    assert counter.get_total_flops() == 2 * sum(forward_flops(CONFIG, work).values())
    inside = forward_flops(CONFIG, work)
    dense = forward_flops(CONFIG, Workload.of(CONFIG, 16, 12, text))
    assert inside["blocks_before"] == dense["blocks_before"]
    if rate:
        assert inside["encoder"] < dense["encoder"]
