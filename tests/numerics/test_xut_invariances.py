"""What must not change a sample's velocity: its padding, its neighbours, the order of tokens and of samples."""

import pytest
import torch
from torch import Tensor

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.positions import token_positions
from toy_run import filled_network

CONFIG = XUTConfig(width=32, mlp_width=48, heads=2, head_dim=16, context_width=12, depth=2, decoder_blocks=2)


def filled(**changes: object) -> XUT:
    return filled_network(XUTConfig.from_json(CONFIG.to_json() | changes))


def sample(batch: int = 3, text: int = 6, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(batch, 4, height, width), draw(batch).sigmoid(), draw(batch, text, 12)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < 1e-10 * expected.norm())


@pytest.mark.parametrize("routed", [False, True])
def test_context_lengths_equal_running_alone_with_own_text(routed: bool) -> None:
    model, (latent, t, context) = filled(), sample()
    lengths = [6, 0, 2]
    keep = torch.tensor([[0, 5, 9], [1, 2, 14], [3, 7, 8]]) if routed else None
    poisoned = context.clone()
    for row, length in enumerate(lengths):
        poisoned[row, length:] = float("nan")
    found = model(latent, t, poisoned, context_lengths=torch.tensor(lengths), keep=keep)
    for row, length in enumerate(lengths):
        part = slice(row, row + 1)
        alone = model(latent[part], t[part], context[part, :length], keep=None if keep is None else keep[part])
        assert close(found[part], alone)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("longer", [1, 26])
def test_fewer_places_of_padding_change_neither_velocities_nor_gradients(routed: bool, longer: int) -> None:
    """The same captions cut to the longest and padded further: equal to 1e-12, the gradients of every weight too."""
    model, (latent, t, context) = filled(), sample()
    lengths, places = torch.tensor([5, 1, 3]), 5
    keep = torch.tensor([[0, 5, 9], [1, 2, 14], [3, 7, 8]]) if routed else None
    target = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for count in (places, places + longer):
        padded = torch.full((3, count, 12), 7.0, dtype=torch.float64)
        padded[:, :places] = context[:, :places]
        model.zero_grad()
        velocity = model(latent, t, padded, context_lengths=lengths, keep=keep)
        (velocity - target).square().mean().backward()
        found.append([velocity.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)])
    for cut, padded in zip(*found, strict=True):
        assert (cut - padded).norm() <= 1e-12 * cut.norm()
    assert len(found[0]) > 50


def test_padding_gets_no_gradient_and_gives_none() -> None:
    model, (latent, t, context) = filled(), sample()
    context.requires_grad_()
    model(latent, t, context, context_lengths=torch.tensor([1, 4, 6])).square().sum().backward()
    assert context.grad is not None
    assert context.grad[0, :1].abs().sum() > 0
    assert context.grad[0, 1:].abs().sum() == 0
    assert context.grad[1, 4:].abs().sum() == 0


def test_all_lengths_full_is_the_unmasked_path() -> None:
    model, (latent, t, context) = filled(), sample()
    assert close(model(latent, t, context, context_lengths=torch.full((3,), 6)), model(latent, t, context))


def test_samples_do_not_see_each_other() -> None:
    model, (latent, t, context) = filled(), sample()
    whole = model(latent, t, context)
    order = torch.tensor([2, 0, 1])
    assert close(model(latent[order], t[order], context[order]), whole[order])
    assert close(torch.cat([model(latent[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(3)]), whole)


def test_text_is_a_set() -> None:
    model, (latent, t, context) = filled(), sample()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert close(model(latent, t, context[:, order]), model(latent, t, context))


def test_image_tokens_know_their_place_by_position_alone() -> None:
    """Swapping two patches together with their positions swaps the two patches of the velocity."""
    model, (latent, t, context) = filled(), sample()
    positions = token_positions(4, 4, dtype=torch.float64)
    swapped_positions = positions[:, [1, 0, *range(2, 16)]]
    swap = lambda x: torch.cat([x[..., :2, 2:4], x[..., :2, 0:2], x[..., :2, 4:]], -1)  # noqa: E731
    swapped = torch.cat([swap(latent), latent[..., 2:, :]], dim=-2)
    expected = model(latent, t, context)
    found = model(swapped, t, context, token_positions=swapped_positions)
    assert close(found, torch.cat([swap(expected), expected[..., 2:, :]], dim=-2))
    assert not close(model(swapped, t, context), found)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (10, 2)])
@pytest.mark.parametrize("positions", ["area", "long_side"])
def test_positions_and_aspect_ratio_default_to_those_of_the_latent(height: int, width: int, positions: str) -> None:
    model, (latent, t, context) = filled(positions=positions), sample(height=height, width=width)
    grid = token_positions(height // 2, width // 2, convention=positions, dtype=torch.float64)
    aspect = torch.full((3,), width / height, dtype=torch.float64).log()
    explicit = model(latent, t, context, token_positions=grid.expand(3, -1, -1), log_aspect_ratio=aspect)
    assert close(model(latent, t, context), explicit)
    other = model(latent, t, context, log_aspect_ratio=aspect + 0.5)
    assert not close(other, explicit)


def test_the_default_aspect_ratio_does_not_take_the_precision_of_t() -> None:
    model, (latent, _, context) = filled(), sample(height=4, width=12)
    expected = model(latent, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), context)
    for dtype in (torch.int64, torch.bfloat16):
        assert close(model(latent, torch.tensor([0, 1, 1], dtype=dtype), context), expected)


def test_without_aspect_ratio_input_the_argument_is_passed_over() -> None:
    model, (latent, t, context) = filled(aspect_ratio=False), sample()
    assert torch.equal(model(latent, t, context, log_aspect_ratio=torch.ones(3)), model(latent, t, context))


@pytest.mark.parametrize(("skips", "order"), [("mirrored", [2, 1, 0]), ("last", [2, 2, 2])])
def test_each_decoder_level_reads_its_encoder_level(skips: str, order: list[int]) -> None:
    model, (latent, t, context) = filled(skips=skips, depth=3), sample()
    encoded, read = [], []
    for level in model.encoder:
        level[-1].register_forward_hook(lambda _m, _args, out: encoded.append(out))
    for level in model.decoder:
        level[0].cross_attention.register_forward_pre_hook(lambda _m, args: read.append(args[1]))
        assert not any(hasattr(block, "cross_attention") for block in level[1:])
    model(latent, t, context)
    assert [next(i for i, out in enumerate(encoded) if out is memory) for memory in read] == order


def test_concatenated_skips_come_from_the_mirrored_level() -> None:
    model, (latent, t, context) = filled(skips="concatenation", depth=3), sample()
    encoded, joined = [], []
    for level in model.encoder:
        level[-1].register_forward_hook(lambda _m, _args, out: encoded.append(out))
    for level in model.decoder:
        level[0].memory_projection.register_forward_pre_hook(lambda _m, args: joined.append(args[0]))
        assert not any(hasattr(block, "memory_projection") for block in level[1:])
    model(latent, t, context)
    assert [next(i for i, out in enumerate(encoded) if torch.equal(out, pair[..., 32:])) for pair in joined] == [
        2,
        1,
        0,
    ]
    assert torch.equal(joined[0][..., :32], encoded[-1])


@pytest.mark.parametrize("skips", ["none", "concatenation"])
@pytest.mark.parametrize("routed", [False, True])
def test_a_gradient_reaches_every_weight_of_each_wiring(skips: str, routed: bool) -> None:
    model, (latent, t, context) = filled(skips=skips, depth=3), sample()
    keep = torch.tensor([[0, 5, 9], [1, 2, 14], [3, 7, 8]]) if routed else None
    model(latent, t, context, keep=keep, log_aspect_ratio=torch.ones(3).double()).square().mean().backward()
    assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []


@pytest.mark.parametrize(("skips", "reached"), [("none", False), ("mirrored", True), ("concatenation", True)])
def test_the_first_encoder_level_has_a_way_past_the_others(skips: str, reached: bool) -> None:
    """With the second level silenced at its end, only a skip brings the first level's change to the velocity."""
    model, (latent, t, context) = filled(skips=skips, depth=2, encoder_blocks=1), sample()
    with torch.no_grad():
        before = model(latent, t, context)
    model.encoder[1][0].register_forward_hook(lambda _m, _args, out: torch.ones_like(out))
    with torch.no_grad():
        blocked = model(latent, t, context)
        model.encoder[0][0].feed_forward.output.weight.mul_(-1)
        changed = model(latent, t, context)
    assert not close(before, blocked)
    assert close(blocked, changed) is not reached


def test_rotary_attention_depends_on_differences_of_position_only() -> None:
    model, (latent, t, context) = filled(), sample(text=0)
    positions = token_positions(4, 4, dtype=torch.float64)
    moved = positions + torch.tensor([0.3, -1.1], dtype=torch.float64)
    found = model(latent, t, context, token_positions=moved)
    assert close(found, model(latent, t, context, token_positions=positions))


def test_one_graph_without_breaks() -> None:
    model, (latent, t, context) = filled(), sample()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    arguments = {"context_lengths": torch.tensor([1, 4, 6]), "keep": torch.tensor([[0, 5], [1, 2], [3, 7]])}
    assert close(compiled(latent, t, context, **arguments), model(latent, t, context, **arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_keeps_exact_frequencies(dtype: torch.dtype) -> None:
    model, (latent, t, context) = filled().float(), sample()
    latent, t, context = latent.float(), t.float(), context.float()
    expected = model(latent, t, context)
    with torch.autocast("cpu", dtype):
        mixed = model(latent, t, context, context_lengths=torch.tensor([6, 6, 6]))
    assert mixed.dtype == dtype
    frequencies = model.time_embedding.frequencies.clone()
    cast = model.to(dtype)(latent, t, context)
    assert torch.equal(model.time_embedding.frequencies, frequencies)
    for found in (mixed, cast):
        assert found.isfinite().all()
        assert (found - expected).norm() < 0.03 * expected.norm()
