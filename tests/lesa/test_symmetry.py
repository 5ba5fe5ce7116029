"""Moving the private side of real models in float64: what they compute stays, and moves follow one another."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch

from lesa_ray.lesa.alignment import align
from lesa_ray.lesa.symmetry import chained, identity
from tests import families
from tests.lesa.moves import as_out_in, attention, blocks_in, mlp, move_model, outputs, random_layer, random_map

Bases = Callable[[str], str]
FUSED = ("phi3", "gpt_neox", "gpt2")
"""Families with several projections in one matrix."""
BLOCKS = {
    "grouped": attention(6, 3, 4),
    "many heads": attention(4, 4, 6, "any"),
    "gated": mlp(7),
    "plain": mlp(7, {"fc1": "gate", "fc1.bias": "gate", "fc2": "down"}),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "bert", *FUSED])
def test_any_allowed_move_keeps_what_a_model_computes(family: str, bases: Bases) -> None:
    model = families.load_strict(bases(family), family, dtype=torch.float64)
    before, weights = outputs(model, families.tokens()), {n: p.clone() for n, p in model.named_parameters()}
    anatomy, blocks = blocks_in(bases(family))
    for layer in range(anatomy.layers):
        for at, block in enumerate(blocks):
            move_model(model, anatomy, layer, block, random_map(block, seed=2 * layer + at))
    assert (outputs(model, families.tokens()) - before).abs().max() <= 1e-10
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    private = {anatomy.name(i, n) for i in range(anatomy.layers) for block in blocks for n in block.parts}
    assert changed <= private
    assert len(changed) > len(private) / 2  # two groups that may not be turned may happen to stay


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", *FUSED])
def test_a_model_whose_layers_are_all_aligned_computes_the_same(family: str, bases: Bases) -> None:
    model = families.load_strict(bases(family), family, dtype=torch.float64)
    before, weights = outputs(model, families.tokens()), {n: p.clone() for n, p in model.named_parameters()}
    anatomy, blocks = blocks_in(bases(family))
    for block in blocks:
        layers = [
            {n: as_out_in(anatomy, n, weights[anatomy.name(i, n)]) for n in block.parts} for i in range(anatomy.layers)
        ]
        steps = [align(below, above, block) for below, above in itertools.pairwise(layers)]
        for i, mapping in enumerate(chained(block, steps)):
            move_model(model, anatomy, i, block, mapping)
    assert (outputs(model, families.tokens()) - before).abs().max() <= 1e-10
    moved, name = dict(model.named_parameters()), next(blocks[1].named("gate"))
    assert torch.equal(moved[anatomy.name(0, name)], weights[anatomy.name(0, name)])
    assert not torch.equal(moved[anatomy.name(1, name)], weights[anatomy.name(1, name)])


def test_rotary_queries_turned_across_planes_compute_something_else(bases: Bases) -> None:
    model = families.load_strict(bases("llama"), "llama", dtype=torch.float64)
    before = outputs(model, families.tokens())
    anatomy, (block, _) = blocks_in(bases("llama"))
    move_model(model, anatomy, 0, block, random_map(dataclasses.replace(block, query_rotation="any"), seed=0))
    assert (outputs(model, families.tokens()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", BLOCKS)
def test_restored_undoes_moved(name: str) -> None:
    block, mapping = BLOCKS[name], random_map(BLOCKS[name], seed=1)
    for part_name, tensor in random_layer(block, 5, seed=0).items():
        part = block.parts[part_name]
        there = mapping.moved(part, tensor)
        assert not torch.equal(there, tensor)
        torch.testing.assert_close(mapping.restored(part, there), tensor, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_maps_follow_one_another(name: str) -> None:
    block = BLOCKS[name]
    steps = [random_map(block, seed) for seed in (1, 2)]
    maps = chained(block, steps)
    for part_name, tensor in random_layer(block, 5, seed=0).items():
        part = block.parts[part_name]
        assert torch.equal(maps[0].moved(part, tensor), tensor)
        by_steps = steps[0].moved(part, steps[1].moved(part, tensor))  # layer 2 to layer 1's place, then to layer 0's
        torch.testing.assert_close(maps[2].moved(part, tensor), by_steps, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_neurons_keep_their_numbers_and_heads_are_turned_in_float32(dtype: torch.dtype) -> None:
    for block, expected in ((BLOCKS["gated"], dtype), (BLOCKS["grouped"], torch.float32)):
        layer = random_layer(block, 5, seed=0, dtype=dtype)
        for name, tensor in layer.items():
            moved = random_map(block, 3).moved(block.parts[name], tensor)
            assert moved.dtype == expected
            assert torch.equal(identity(block).moved(block.parts[name], tensor), tensor.to(expected))
            if block is BLOCKS["gated"]:
                assert torch.equal(moved.abs().flatten().sort()[0], tensor.abs().flatten().sort()[0])
