"""LESA with a predictor for each expert: how they are put into units, and that this decides no byte on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lesa_ray import ExpandConfig, Expanded
from lesa_ray.expansion.prepare import prepare
from tests import families

Bases = Callable[[str], str]
Grow = Callable[..., Expanded]


def unit_names(base: str, out: Any, **settings: Any) -> list[str]:
    config = ExpandConfig.model_validate({"base": base, "out": str(out), **settings})
    return [unit.name for unit in prepare(config).units if "w2" in unit.name]


@pytest.mark.parametrize(
    ("most", "settings", "units"),
    [
        (16, {}, ["0-3"]),
        (3, {}, ["0-1", "2-3"]),
        (1, {}, ["0", "1", "2", "3"]),
        (16, {"gpus_per_task": 0}, ["0", "1", "2", "3"]),
        (16, {"lesa": {"predictor": "ridge"}}, ["0", "1", "2", "3"]),
        (16, {"lesa": {"share_experts": True}}, ["*"]),
    ],
)
def test_experts_of_a_kind_make_units(
    most: int, settings: Any, units: list[str], bases: Bases, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesa_ray.lesa.cost.STACK", most)
    found = unit_names(bases("mixtral"), tmp_path / "out", **settings)
    assert found == [f"block_sparse_moe.experts.{which}.w2.weight" for which in units]


def test_units_of_several_experts_make_what_each_expert_s_own_makes(bases: Bases, grow: Grow) -> None:
    """Later rounds among it, and projections that are zero in the result but needed for the next round."""
    settings = {"lesa": {"epochs": 1}, "layers": 4 * families.LAYERS, "zero_init": True}
    together = grow(bases("mixtral"), **settings)
    alone = grow(bases("mixtral"), **settings, gpus_per_task=0)
    assert sorted(together.manifest["fit"]) == sorted(alone.manifest["fit"])
    assert together.manifest["fit"] == alone.manifest["fit"]
    assert together.manifest["fingerprint"] == alone.manifest["fingerprint"]
    assert "block_sparse_moe.experts.3.w1.weight" in together.manifest["fit"]
    for new in together.manifest["new_layers"]:
        one, other = (families.layer_tensors(result.out, "mixtral", new) for result in (together, alone))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_stacked_experts_make_nearly_the_same(bases: Bases, grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, by a stack of three and one of one shape more."""
    alone = grow(bases("qwen3_moe"), lesa={"epochs": 2})
    monkeypatch.setattr("lesa_ray.lesa.task.STACKED_ON", ("cpu", "cuda"))
    monkeypatch.setattr("lesa_ray.lesa.cost.STACK", 3)
    together = grow(bases("qwen3_moe"), lesa={"epochs": 2})
    for new in together.manifest["new_layers"]:
        one, other = (families.layer_tensors(result.out, "qwen3_moe", new) for result in (together, alone))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-3 * float(other[name].abs().max()))
