"""The rule for layers of different widths: sizes by hand, padding and cutting beside NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lesa_ray import UserError
from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.expansion.plan import Plan, after_groups, between, stacked
from lesa_ray.expansion.widths import (
    PRIVATE,
    Width,
    Widths,
    base_multiple,
    chosen,
    interpolated,
    squares,
    taken,
    with_slots,
)

UNEVEN = (Width(64, 4), Width(256, 8), Width(128, 4))


def sizes(plan: Plan, factors: tuple[float, ...] = (1.0,), multiple: int = 8) -> list[tuple[int, int]]:
    """The widths of a plan's slots from bottom to top."""
    found = with_slots(Widths(UNEVEN, (), kv_heads=2, head_dim=8, multiple=multiple), plan, factors)
    return [(found.of(o.id).neurons, found.of(o.id).heads) for o in plan.outputs if o.id >= 3]


def test_a_slots_width_is_that_of_its_place_between_old_layers() -> None:
    assert sizes(between(3, 5, "0,1")) == [(160, 6), (192, 6)]
    # four layers in the lower gap, three in the upper: 64 + 192·k/5 and 256 − 128·k/4, to multiples of 8
    assert [size for size, _ in sizes(between(3, 9, "top"))] == [112, 160, 208, 224, 192, 160]
    # a narrow layer is never rounded away, nor are heads below one for each KV head
    assert sizes(between(3, 4, "0"), (0.01,)) == [(8, 2)]
    assert sizes(between(3, 4, "0"), (3.0,)) == [(480, 18)]


def even(heads: int, kv_heads: int, *factors: float) -> Widths:
    """Of a base of alike layers and one new layer for each factor."""
    widths = Widths((Width(1024, heads),) * 2, (), kv_heads, head_dim=8, multiple=64)
    return with_slots(widths, between(2, 2 + len(factors), "top"), factors)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "factor", "rounded"),
    [(32, 32, 0.25, 32), (32, 32, 1.25, 32), (32, 32, 1.4, 32), (32, 32, 1.5, 64), (32, 8, 0.5, 16), (32, 8, 0.6, 16),
     (32, 8, 1.2, 40), (14, 2, 0.5, 8), (14, 2, 0.01, 2)],
)  # fmt: skip
def test_heads_are_the_nearest_multiple_of_the_kv_heads(heads: int, kv_heads: int, factor: float, rounded: int) -> None:
    assert [slot.heads for slot in even(heads, kv_heads, factor).slots] == [rounded]


def test_a_note_says_where_heads_are_not_what_was_asked() -> None:
    steps = "query heads come in steps of the 32 KV heads"
    assert even(32, 32, 0.5).note == f"{steps}: 32 instead of 16"
    assert even(32, 32, 1.25).note == f"{steps}: 32 instead of 40"
    assert even(32, 32, 0.75, 0.5, 1.0).note == f"{steps}: 32 instead of 16, the most of 2 new layers"
    assert even(32, 32, 1.05).note is None
    assert even(32, 8, 0.5).note is None


def test_copies_without_an_upper_neighbour_are_as_wide_as_what_they_copy() -> None:
    assert sizes(after_groups(3, 6)) == [(160, 6), (192, 6), (128, 4)]
    assert sizes(stacked(3, 4)) == [(256, 8)]


def test_factors_are_knots_spread_over_the_new_layers() -> None:
    assert interpolated((0.5,), 3) == [0.5, 0.5, 0.5]
    assert interpolated((0.5, 1.0), 3) == [0.5, 0.75, 1.0]
    assert interpolated((1.0, 2.0, 1.0), 4) == pytest.approx([1, 5 / 3, 5 / 3, 1])
    assert interpolated((1.0, 2.0), 2) == [1.0, 2.0]
    assert interpolated((2.0,), 1) == [2.0]
    with pytest.raises(UserError, match=r"^--new-width 0.5,1,2: 3 values for 2 new layers; give one, or at most"):
        sizes(between(3, 5, "0,1"), (0.5, 1.0, 2.0))


@pytest.mark.parametrize(
    ("neurons", "multiple"),
    [((11008,), 256), ((14336, 14336), 256), ((96,), 4), ((64, 192), 64), ((768, 3072), 256), ((5, 7), 1)],
)
def test_the_multiple_is_one_that_the_base_uses(neurons: tuple[int, ...], multiple: int) -> None:
    assert base_multiple(neurons) == multiple


def test_the_largest_of_each_group_are_kept_in_their_order() -> None:
    norms = torch.tensor([[1.0, 5.0, 3.0, 4.0], [0.0, 2.0, 0.0, 2.0]])
    assert chosen(norms, 2) == [[1, 3], [1, 3]]
    assert chosen(norms, 3) == [[1, 2, 3], [1, 3, -1]]
    assert chosen(norms, 5) == [[0, 1, 2, 3, -1], [1, 3, -1, -1, -1]]
    assert chosen(torch.ones(1, 4), 2) == [[0, 1]]


@pytest.mark.parametrize("axis", [0, 1])
def test_heads_are_taken_from_their_own_group(axis: int) -> None:
    groups, members, size = 2, 3, 2
    rows = torch.randn(groups * members * size, 5, generator=torch.Generator().manual_seed(0))
    tensor = rows if axis == 0 else rows.T.contiguous()
    in_heads = rows.numpy().reshape(groups, members, size, 5)
    norms = squares(tensor, axis, groups, size)
    np.testing.assert_allclose(norms.numpy(), (in_heads.astype(np.float64) ** 2).sum((2, 3)), rtol=1e-6)

    cut = taken(tensor, axis, [[0, 2], [1, 2]], members, size)
    expected = np.stack([in_heads[0, [0, 2]], in_heads[1, [1, 2]]]).reshape(-1, 5)
    np.testing.assert_array_equal((cut if axis == 0 else cut.T).numpy(), expected)

    wide = taken(tensor, axis, [[0, 1, 2, -1]] * 2, members, size)
    expected = np.concatenate([in_heads, np.zeros((groups, 1, size, 5), np.float32)], axis=1).reshape(-1, 5)
    np.testing.assert_array_equal((wide if axis == 0 else wide.T).numpy(), expected)


def test_added_rows_are_noise_as_large_as_the_others() -> None:
    tensor = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    wide = taken(tensor, 0, [[*range(40)] + [-1] * 40], 40, 1, torch.Generator().manual_seed(1))
    assert torch.equal(wide[:40], tensor)
    assert float(wide[40:].std()) == pytest.approx(3, rel=0.1)
    again = taken(tensor, 0, [[*range(40)] + [-1] * 40], 40, 1, torch.Generator().manual_seed(1))
    assert torch.equal(wide, again)


def test_a_layer_is_padded_within_its_groups() -> None:
    widths = Widths(base=(Width(4, 4), Width(6, 8)), slots=(), kv_heads=2, head_dim=3, multiple=2)
    query = torch.arange(1.0, 13).reshape(12, 1)
    padded = widths.padded("self_attn.q_proj.weight", 0, query)
    zeros = torch.zeros(6, 1)
    assert torch.equal(padded, torch.cat([query[:6], zeros, query[6:], zeros]))
    down = torch.ones(2, 4)
    assert torch.equal(widths.padded("mlp.down_proj.weight", 0, down), torch.cat([down, torch.zeros(2, 2)], 1))
    assert widths.padded("mlp.down_proj.weight", 1, down) is down
    assert widths.padded("self_attn.k_proj.weight", 0, down) is down
    types = {
        name: WeightType(name, (4, 2) if axis == 0 else (2, 4), "F32", "matrix") for name, (_, axis) in PRIVATE.items()
    }
    shapes = {name: one.shape for name, one in widths.padded_types(types).items()}
    assert shapes["mlp.gate_proj.weight"] == (6, 2)
    assert shapes["mlp.down_proj.weight"] == (2, 6)
    assert shapes["self_attn.o_proj.weight"] == (2, 24)


def test_what_a_method_made_of_padded_layers_is_cut_even_to_the_first_layers_width() -> None:
    widths = Widths((Width(4, 4), Width(6, 4)), slots=(Width(4, 4),), kv_heads=2, head_dim=3, multiple=2)
    assert widths.changes(2, "mlp.down_proj.weight")
    assert not widths.changes(2, "self_attn.o_proj.weight")
    assert not widths.changes(2, "input_layernorm.weight")
