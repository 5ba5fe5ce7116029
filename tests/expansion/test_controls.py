"""Random layers and plain copies, and the gate on what new layers write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from lesa_ray import ExpandConfig, Expanded, UserError
from tests import families

Bases = Callable[[str], str]
Grow = Callable[..., Expanded]


def new_and_neighbours(result: Expanded, family: str) -> list[dict[str, torch.Tensor]]:
    """Tensors of the first new layer, and of the layers of the result below and above it."""
    record = next(r for r in result.manifest["layers"] if r["kind"] != "old")
    return [families.layer_tensors(result.out, family, record["index"] + at) for at in (0, -1, 1)]


def test_random_layers_have_their_neighbours_size_and_nothing_else(bases: Bases, grow: Grow) -> None:
    result = grow(bases("gpt2"), method="random", zero_init=False, layers=families.LAYERS + 1)
    new, lower, upper = new_and_neighbours(result, "gpt2")
    for name, tensor in new.items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, lower[name])
            continue
        size = (lower[name].std(correction=0) + upper[name].std(correction=0)) / 2
        assert abs(tensor.std(correction=0) / size - 1) < 0.05
        assert abs(tensor.mean() / size) < 0.05
        for other in (lower, upper):
            assert abs(torch.corrcoef(torch.stack([tensor.flatten(), other[name].flatten()]))[0, 1]) < 0.05
    matrices = [tensor.flatten()[:1000] for tensor in new.values() if tensor.ndim == 2]
    assert abs(torch.corrcoef(torch.stack(matrices)) - torch.eye(len(matrices))).max() < 0.15  # a seed for each


def test_random_layers_follow_the_seed(bases: Bases, grow: Grow) -> None:
    made = [grow(bases("llama"), method="random", seed=seed, layers=families.LAYERS + 2) for seed in (0, 0, 1)]
    layers = [new_and_neighbours(result, "llama")[0] for result in made]
    name = "mlp.up_proj.weight"
    second = families.layer_tensors(made[0].out, "llama", made[0].manifest["new_layers"][1])[name]
    assert abs(torch.corrcoef(torch.stack([layers[0][name].flatten(), second.flatten()]))[0, 1]) < 0.05
    assert torch.equal(layers[0][name], layers[1][name])
    assert not torch.equal(layers[0][name], layers[2][name])
    assert not layers[0]["mlp.down_proj.weight"].any()


def test_copies_are_their_lower_neighbours(bases: Bases, grow: Grow) -> None:
    result = grow(bases("llama"), method="copy", position="1,3")
    assert result.manifest["new_layers"] == [2, 5]
    for index in (2, 5):
        below, new = (families.layer_tensors(result.out, "llama", i) for i in (index - 1, index))
        assert all(torch.equal(below[name], new[name]) for name in below)
    assert result.manifest["train"] == "new"
    assert result.manifest["paper"] == ""
    assert "(a control)" in (Path(result.out) / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "family", "dtype"),
    [("copy", "gpt2", None), ("avg-deus", "llama", "bfloat16"), ("avg-deus", "llama", None)],
)
def test_what_new_layers_write_is_scaled_and_nothing_else(
    method: str, family: str, dtype: str | None, bases: Bases, grow: Grow
) -> None:
    """More new layers than gaps, so that some are made from new ones: from what those were before."""
    plain, scaled = (
        grow(bases(family), method=method, layers=2 * families.LAYERS + 1, dtype=dtype, output_scale=scale)
        for scale in (1.0, 0.25)
    )
    writes, prefix = families.FAMILIES[family].writes, families.FAMILIES[family].layer_prefix
    changed = set()
    one, other = (families.tensors(result.out) for result in (plain, scaled))
    for name, tensor in one.items():
        if not torch.equal(other[name], tensor):
            assert torch.equal(other[name], tensor * 0.25), name
            changed.add(name)
    new = tuple(f"{prefix}{index}." for index in plain.manifest["new_layers"])
    ours = {name: name.removeprefix(prefix).partition(".")[2] for name in one if name.startswith(new)}
    assert changed == {name for name, suffix in ours.items() if families.matches(suffix, writes)}
    assert "multiplied by 0.25" in (Path(scaled.out) / "README.md").read_text()


def test_scaled_by_zero_is_zero_init(bases: Bases, grow: Grow) -> None:
    zeroed = grow(bases("llama"), method="avg-deus", zero_init=True)
    scaled = grow(bases("llama"), method="avg-deus", output_scale=0)
    one, other = (families.tensors(result.out) for result in (zeroed, scaled))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert zeroed.manifest["zeroed"] == scaled.manifest["zeroed"] != []


def test_llama_pro_with_a_gate_is_not_zero(bases: Bases, grow: Grow) -> None:
    result = grow(bases("llama"), method="llama-pro", output_scale=0.5)
    assert result.manifest["zeroed"] == []
    new, lower, _ = new_and_neighbours(result, "llama")
    assert torch.equal(new["mlp.down_proj.weight"], lower["mlp.down_proj.weight"] / 2)


def test_both_gates_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match="zero_init is output_scale 0"):
        ExpandConfig(base="b", out="o", zero_init=False, output_scale=0.5)


def test_without_known_writers_there_is_nothing_to_scale(
    bases: Bases, grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesa_ray.expansion.method.residual_writers", lambda types: ())
    with pytest.raises(UserError, match=r"output_scale 0.5: cannot tell which tensors of a llama layer"):
        grow(bases("llama"), method="copy", output_scale=0.5)
