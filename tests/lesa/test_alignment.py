"""Matching neurons and heads: what was moved is found again, and the optimum is the one of a plain search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lesa_ray.lesa.alignment import _best, align, move
from lesa_ray.lesa.assignment import assign
from tests.lesa.moves import PLAIN, attention, mlp, random_layer, random_map

BLOCKS = {
    "gated": mlp(40),
    "plain": mlp(40, PLAIN),
    "rotary": attention(8, 2, 6),
    "rotary, one query head a group": attention(3, 3, 8),
    "no positions": attention(4, 2, 5, "any"),
    "heads as they are": attention(6, 3, 4, "none", "none"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_moved_layer_with_noise_comes_back(name: str, dtype: torch.dtype) -> None:
    block = BLOCKS[name]
    layer = random_layer(block, 24, seed=0)
    noise = random_layer(block, 24, seed=1)
    moved = move({n: w + 0.1 * noise[n] for n, w in layer.items()}, block, random_map(block, seed=2))
    target, moving = ({n: w.to(dtype) for n, w in one.items()} for one in (layer, moved))
    back = move(moving, block, align(target, moving, block))
    for n, weight in layer.items():
        error = (back[n].double() - weight).norm() / weight.norm()
        assert error < 0.13, n
        assert (moving[n].double() - weight).norm() / weight.norm() > 0.5, n


@pytest.mark.parametrize("name", ["gated", "plain"])
def test_neurons_are_paired_with_the_largest_total_cosine(name: str) -> None:
    block = mlp(6, BLOCKS[name].parts)
    below, above = (random_layer(block, 4, seed) for seed in (0, 1))
    for seed, layer in enumerate((below, above)):  # neurons, and of each its parts, of very different lengths
        for part_name, part in block.parts.items():
            sizes = 10 ** random_layer(mlp(6), 1, 20 + seed if part == "gate" else 30 + seed)["gate"]
            layer[part_name] *= sizes.T if part == "down" else sizes
    found = align(below, above, block)

    def neuron(layer: dict[str, torch.Tensor], at: int, sign: int) -> np.ndarray:
        rows = []
        for part_name, part in block.parts.items():
            row = layer[part_name][:, at] if part == "down" else layer[part_name][at]
            rows.append(row.numpy() * (sign if name == "gated" and part in ("up", "down") else 1))
        return np.concatenate(rows)

    def cosine(a: int, b: int, sign: int) -> float:
        x, y = neuron(below, a, 1), neuron(above, b, sign)
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    signs = (1, -1) if name == "gated" else (1,)
    likeness = [[max(cosine(a, b, sign) for sign in signs) for b in range(6)] for a in range(6)]
    totals = {order: sum(likeness[a][b] for a, b in enumerate(order)) for order in itertools.permutations(range(6))}
    order = tuple(found.order.tolist())
    assert totals[order] == pytest.approx(max(totals.values()), abs=1e-12)
    for a, b in enumerate(order):
        assert int(found.signs[a]) == max(signs, key=lambda sign: cosine(a, b, sign))


def test_rotations_in_planes_are_the_best_of_all_angles() -> None:
    product = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = _best(product, "planes")
    torch.testing.assert_close(best @ best.T, torch.eye(6, dtype=torch.float64))
    total = 0.0
    for j in range(3):
        gains = []
        for angle in np.linspace(0, 2 * math.pi, 1801):
            c, s = math.cos(angle), math.sin(angle)
            turn = torch.zeros(6, 6, dtype=torch.float64)
            turn[j, j], turn[j, j + 3], turn[j + 3, j], turn[j + 3, j + 3] = c, -s, s, c
            gains.append(float(torch.trace(turn @ product)))
        total += max(gains)
    assert float(torch.trace(best @ product)) == pytest.approx(total, abs=5e-5)


def test_free_rotations_are_procrustes() -> None:
    product = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = _best(product, "any")
    torch.testing.assert_close(best @ best.T, torch.eye(5, dtype=torch.float64))
    assert float(torch.trace(best @ product)) == pytest.approx(np.linalg.norm(product.numpy(), "nuc"))
    assert torch.equal(_best(product, "none"), torch.eye(5, dtype=torch.float64))


def test_groups_are_paired_with_the_largest_total_cosine() -> None:
    """With heads that may not be turned, by trying every order of groups and of heads within them."""
    block = attention(6, 3, 2, "none", "none")
    below, above = (random_layer(block, 5, seed) for seed in (0, 1))
    found = align(below, above, block)

    def halves(layer: dict[str, torch.Tensor], group: int, heads: tuple[int, ...]) -> list[np.ndarray]:
        q, o = layer["q"].view(6, 2, 5), layer["o"].T.reshape(6, 2, 5)
        k, v = layer["k"].view(3, 2, 5), layer["v"].view(3, 2, 5)
        chosen = [2 * group + head for head in heads]
        return [
            np.concatenate([many[h].numpy().ravel() for h in chosen] + [one[group].numpy().ravel()])
            for many, one in ((q, k), (o, v))
        ]

    def gain(a: int, b: int, heads: tuple[int, ...]) -> float:
        pairs = zip(halves(below, a, (0, 1)), halves(above, b, heads), strict=True)
        return sum(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for x, y in pairs)

    best = max(
        sum(max(gain(a, b, heads) for heads in ((0, 1), (1, 0))) for a, b in enumerate(order))
        for order in itertools.permutations(range(3))
    )
    order = found.order.view(3, 2)
    total = sum(gain(a, int(order[a, 0]) // 2, tuple(int(h) % 2 for h in order[a])) for a in range(3))
    assert total == pytest.approx(best, abs=1e-12)


def test_what_is_turned_together_is_turned_the_best_way() -> None:
    """Of orthogonal rotations: the trace is the nuclear norm of the sum over the pairs that were found."""
    block = attention(8, 2, 4, "any")
    below, above = (random_layer(block, 12, seed) for seed in (0, 1))
    found = align(below, above, block)

    def product(part: str, to: int, head: int) -> np.ndarray:
        x, y = ((layer[part].T if part == "o" else layer[part]).numpy() for layer in (below, above))
        result: np.ndarray = y[4 * head : 4 * head + 4] @ x[4 * to : 4 * to + 4].T
        return result

    for group in range(2):
        pairs = [(to, int(found.order[to])) for to in range(4 * group, 4 * group + 4)]
        for of_heads, of_groups, turn in (("q", "k", found.query[group]), ("o", "v", found.value[group])):
            whole = sum(
                (product(of_heads, *pair) for pair in pairs), product(of_groups, group, int(found.groups[group]))
            )
            assert np.trace(turn.numpy() @ whole) == pytest.approx(np.linalg.norm(whole, "nuc"), rel=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCKS)
def test_a_gpu_finds_the_same(name: str) -> None:
    block = BLOCKS[name]
    target, layer = (random_layer(block, 24, seed) for seed in (0, 1))
    on_cpu, on_gpu = (move(layer, block, align(target, layer, block, device=device)) for device in ("cpu", "cuda"))
    for part, weight in on_cpu.items():
        torch.testing.assert_close(on_gpu[part], weight, atol=1e-9, rtol=0)


def test_zero_layers_are_matched_too() -> None:
    """Of a base that was grown with zero output projections."""
    for block in BLOCKS.values():
        layer = random_layer(block, 8, seed=0)
        empty = {n: torch.zeros_like(w) if block.parts[n] in ("o", "down") else w for n, w in layer.items()}
        for target, moving in ((layer, empty), (empty, layer), (empty, empty)):
            moved = move(moving, block, align(target, moving, block))
            assert all(bool(weight.isfinite().all()) for weight in moved.values())


def greedy(similarity: np.ndarray) -> list[int]:
    """The largest entry, then the largest of what is left, …"""
    left, partner = similarity.copy(), [-1] * len(similarity)
    for _ in range(len(similarity)):
        row, column = np.unravel_index(np.argmax(left), left.shape)
        partner[int(row)] = int(column)
        left[row], left[:, column] = -np.inf, -np.inf
    return partner


def test_many_rows_are_assigned_greedily_and_the_last_exactly() -> None:
    similarity = torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert assign(similarity, exact=0).tolist() == greedy(similarity.numpy())
    totals = [float(similarity[torch.arange(60), assign(similarity, exact=n)].sum()) for n in (0, 20, 60)]
    assert sorted(assign(similarity, exact=20).tolist()) == list(range(60))
    assert totals[0] < totals[1] < totals[2]


def test_rows_that_are_all_alike_are_assigned_in_one_go() -> None:
    assert sorted(assign(torch.zeros(300, 300), exact=4).tolist()) == list(range(300))
