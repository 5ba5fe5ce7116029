"""Where new layers go: the published positions, written down by hand, and what holds for every plan."""

from __future__ import annotations

import itertools
import pickle

import pytest

from lesa_ray import UserError
from lesa_ray.expansion.plan import POSITIONS, New, Old, Plan, after_groups, between, stacked, target_layers


def gaps(plan: Plan) -> list[int]:
    """The base layer below each new layer of a one-round plan."""
    return [slot.lower for slot in plan.slots]


def check(plan: Plan, base_layers: int, layers: int) -> None:
    """What holds for every plan: all old layers once, in order; slots refer to layers that are there before them."""
    assert plan.layers == layers
    assert [o.id for o in plan.outputs if isinstance(o, Old)] == list(range(base_layers))
    assert [slot.id for slot in plan.slots] == list(range(base_layers, layers))
    place = {output.id: index for index, output in enumerate(plan.outputs)}
    for slot in plan.slots:
        assert slot.lower < slot.id
        assert slot.upper is None or slot.upper < slot.id
        if slot.upper is not None:
            assert place[slot.lower] < place[slot.id] < place[slot.upper]
    assert len(plan.origins) == layers
    assert all(0 <= origin < base_layers for origin in plan.origins)


def test_slots_are_put_in_order_once() -> None:
    """They are asked for with every tensor of every new layer: 19,000 times for a mixture of 128 experts."""
    plan, fresh = between(8, 20, "top"), between(8, 20, "top")
    assert plan.slots is plan.slots
    assert plan.origins == [plan.origin(output.id) for output in plan.outputs]
    assert plan == fresh == pickle.loads(pickle.dumps(plan))
    assert hash(plan) == hash(fresh)


def test_lesa_32_to_48_fills_the_gaps_after_15_to_30() -> None:
    plan = between(32, 48, "top")
    assert gaps(plan) == list(range(15, 31))
    assert all(slot.upper == slot.lower + 1 for slot in plan.slots)
    assert [o.id for o in plan.outputs[:19]] == [*range(16), 32, 16, 33]
    assert plan.outputs[-1] == Old(31)


def test_llama_pro_puts_a_copy_after_each_group() -> None:
    assert gaps(after_groups(32, 40)) == [3, 7, 11, 15, 19, 23, 27, 31]  # the paper
    assert gaps(after_groups(32, 48)) == list(range(1, 32, 2))
    assert gaps(after_groups(7, 9)) == [3, 6]  # not divisible: groups of 4 and 3
    assert gaps(after_groups(2, 6)) == [0, 0, 1, 1]


def test_solar_32_to_48_is_0_to_23_then_8_to_31() -> None:
    assert stacked(32, 48).origins == [*range(24), *range(8, 32)]
    assert stacked(5, 8).origins == [0, 1, 2, 3, 1, 2, 3, 4]
    assert stacked(4, 7).origins == [0, 1, 2, 3, 1, 2, 3]
    assert stacked(3, 6).origins == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("top", [7, 8, 9, 10]),
        ("bottom", [0, 1, 2, 3]),
        ("middle", [3, 4, 5, 6]),
        ("ends", [0, 1, 9, 10]),
        ("uniform", [1, 4, 6, 9]),
        ("2-5", [2, 3, 4, 5]),
        ("1,5,8-9", [1, 5, 8, 9]),
        ("9,1,5,3", [1, 3, 5, 9]),
    ],
)
def test_positions(position: str, expected: list[int]) -> None:
    assert gaps(between(12, 16, position)) == expected


def test_the_odd_layer_of_ends_goes_on_top() -> None:
    assert gaps(between(12, 15, "ends")) == [0, 9, 10]


@pytest.mark.parametrize("position", POSITIONS)
def test_every_size_from_every_size(position: str) -> None:
    for base_layers, layers in itertools.product(range(2, 9), range(3, 30)):
        if layers > base_layers:
            check(between(base_layers, layers, position), base_layers, layers)


def test_groups_and_stacks_of_every_size() -> None:
    for base_layers, layers in itertools.product(range(1, 9), range(2, 30)):
        if layers > base_layers:
            check(after_groups(base_layers, layers), base_layers, layers)
        if base_layers < layers <= 2 * base_layers:
            plan = stacked(base_layers, layers)
            assert plan.layers == layers
            assert plan.origins == [*range((layers + 1) // 2), *range(base_layers - layers // 2, base_layers)]


def test_three_times_goes_in_rounds() -> None:
    plan = between(3, 9, "top")
    # Both gaps are filled (3, 4), then all four of the grown sequence (5 … 8).
    assert [o.id for o in plan.outputs] == [0, 5, 3, 6, 1, 7, 4, 8, 2]
    assert plan.slots[0] == New(3, 0, 1)
    assert plan.slots[2] == New(5, 0, 3)
    assert plan.slots[3] == New(6, 3, 1)
    assert plan.origins == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_a_second_round_that_is_not_full_follows_the_position() -> None:
    assert [o.id for o in between(3, 6, "top").outputs] == [0, 3, 1, 4, 5, 2]
    assert [o.id for o in between(3, 6, "bottom").outputs] == [0, 5, 3, 1, 4, 2]


@pytest.mark.parametrize(
    ("factor", "layers", "position", "expected"),
    [
        (None, None, None, 48),
        (1.5, None, "top", 48),
        (1.25, None, None, 40),
        (2.0, None, None, 64),
        (None, 33, None, 33),
        (None, None, "15-30", 48),
        (None, None, "1,5,9", 35),
        (1.02, None, None, 33),
    ],
)
def test_how_many_layers(factor: float | None, layers: int | None, position: str | None, expected: int) -> None:
    assert target_layers(32, factor, layers, position) == expected


@pytest.mark.parametrize(
    ("factor", "layers", "says"),
    [
        (1.0, None, "--factor 1: must be greater than 1"),
        (0.5, None, "must be greater than 1"),
        (float("nan"), None, "must be greater than 1"),
        (float("inf"), None, "--factor inf: more than 64 times"),
        (1.001, None, "adds no layer to 32; use --layers 33"),
        (None, 32, "--layers 32: the base has 32 already"),
        (None, 10_000, "more than 64 times"),
    ],
)
def test_sizes_that_are_no_growth(factor: float | None, layers: int | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        target_layers(32, factor, layers, None)


@pytest.mark.parametrize(
    ("position", "says"),
    [
        ("sideways", "unknown; use top"),
        ("31", "gap 31 is out of range"),
        ("9-3", "runs backwards"),
        ("3,3", "names a gap twice"),
        ("3-5,4", "names a gap twice"),
        ("1,2", "names 2 gaps"),
    ],
)
def test_positions_that_make_no_sense(position: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        between(32, 48, position)


def test_plans_that_cannot_be() -> None:
    with pytest.raises(UserError, match="a new layer needs two"):
        between(1, 2, "top")
    with pytest.raises(UserError, match="more than twice"):
        stacked(4, 9)
