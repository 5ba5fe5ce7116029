"""Matched neighbours: layers that differ in the order of their neurons and heads alone are found to be the same."""

from __future__ import annotations

import pytest
import torch

from lesa_ray.analysis.likeness import match_block
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.analysis.subject import open_subject
from lesa_ray.checkpoint.blocks import Attention, Block, Mlp
from lesa_ray.lesa.alignment import Layer
from tests import families

LAYERS = 5


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Attention, Mlp, dict[str, torch.Tensor]]:
    """The blocks of a tiny Llama, and the matrices of its lowest layer."""
    base = families.make("llama", tmp_path_factory.mktemp("likeness"))
    attention, mlp = open_subject(AnalyzeConfig(base=base)).blocks.values()
    assert isinstance(attention, Attention)
    assert isinstance(mlp, Mlp)
    return attention, mlp, families.layer_tensors(base, "llama", 0)


def shuffled(block: Block, layer: dict[str, torch.Tensor], order: torch.Tensor, size: int) -> Layer:
    """`layer` with its units, `size` rows each, in another order."""
    moved = {}
    for name in block.matrices:
        axis = 1 if block.parts[name] in ("o", "down") else 0
        units = layer[name].shape[axis] // size
        pieces = layer[name].split(layer[name].shape[axis] // len(order), dim=axis)
        assert units % len(order) == 0
        moved[name] = torch.cat([pieces[i] for i in order], dim=axis)
    return moved


@pytest.mark.parametrize("which", ["attention", "mlp"])
def test_order_does_not_count_and_chance_is_told(
    which: str, blocks: tuple[Attention, Mlp, dict[str, torch.Tensor]]
) -> None:
    attention, mlp, layer = blocks
    block: Block = attention if which == "attention" else mlp
    units, size = (attention.groups, attention.size) if which == "attention" else (mlp.neurons, 1)
    draw = torch.Generator().manual_seed(0)
    orders = [torch.randperm(units, generator=draw) for _ in range(LAYERS)]
    orders[1] = torch.arange(units).flip(0)
    layers = [shuffled(block, layer, order, size) for order in orders]
    figures = match_block(layers.__getitem__, LAYERS, block, seed=0)
    for name in block.matrices:
        assert figures.neighbours[name] == pytest.approx([1.0] * (LAYERS - 1))
        assert all(abs(value or 0) < 0.7 for value in figures.chance[name])
        assert len(set(figures.chance[name])) > 1
        found = figures.candidates[name]
        assert found["lower"] == pytest.approx({"cosine": 1.0, "r2": 1.0})
        assert found["aligned mean"] == pytest.approx({"cosine": 1.0, "r2": 1.0})
        assert (found["random"]["cosine"] or 0) < 0.7


def test_a_zero_layer_has_no_likeness(blocks: tuple[Attention, Mlp, dict[str, torch.Tensor]]) -> None:
    _, mlp, layer = blocks
    layers = [layer] * LAYERS
    layers[3] = {name: torch.zeros_like(tensor) for name, tensor in layer.items()}
    figures = match_block(layers.__getitem__, LAYERS, mlp, seed=0)
    for name in mlp.matrices:
        assert figures.neighbours[name] == [pytest.approx(1), pytest.approx(1), None, None]
        assert figures.candidates[name]["lower"] == {"cosine": None, "r2": None}


def test_two_layers_have_no_one_between(blocks: tuple[Attention, Mlp, dict[str, torch.Tensor]]) -> None:
    _, mlp, layer = blocks
    figures = match_block([layer, layer].__getitem__, 2, mlp, seed=0)
    assert all(found == {} for found in figures.candidates.values())
    assert all(values == pytest.approx([1.0]) for values in figures.neighbours.values())


def test_new_layers_are_not_scored(blocks: tuple[Attention, Mlp, dict[str, torch.Tensor]]) -> None:
    _, mlp, layer = blocks
    figures = match_block(([layer] * 6).__getitem__, 6, mlp, seed=0, new=[4])
    for name in mlp.matrices:
        for values in (figures.neighbours[name], figures.chance[name]):
            assert [value is None for value in values] == [False, False, False, True, True]
        assert figures.candidates[name]["lower"] == pytest.approx({"cosine": 1.0, "r2": 1.0})
    figures = match_block({0: layer, 2: layer, 4: layer}.__getitem__, 5, mlp, seed=0, new=[1, 3])
    assert all(values == [None] * 4 for values in figures.neighbours.values())
    assert all(found["upper"]["cosine"] == pytest.approx(1) for found in figures.candidates.values())
