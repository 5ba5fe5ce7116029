"""LESA with one predictor for all experts of a kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lesa_ray import ExpandConfig, Expanded, UserError
from lesa_ray.expansion.prepare import prepare
from lesa_ray.lesa.fit import Fit, fit_each
from tests import families
from tests.lesa.test_fit import QUICK

Bases = Callable[[str], str]
Grow = Callable[..., Expanded]
KINDS = {
    "mixtral": [f"block_sparse_moe.experts.*.{name}.weight" for name in ("w1", "w2", "w3")],
    "qwen3_moe": [f"mlp.experts.*.{name}_proj.weight" for name in ("gate", "up", "down")],
}


@pytest.mark.parametrize("predictor", ["mlp", "ridge"])
@pytest.mark.parametrize("family", list(KINDS))
def test_experts_of_a_kind_are_one_unit_and_the_result_runs(
    family: str, predictor: str, bases: Bases, grow: Grow
) -> None:
    lesa = {"epochs": 1, "share_experts": True, "predictor": predictor}
    result = grow(bases(family), lesa=lesa)
    fits = result.manifest["fit"]
    assert sorted(name for name in fits if "experts" in name) == sorted(KINDS[family])
    for name, fit in fits.items():
        members = 4 if "experts" in name else 1
        assert fit["members"] == members
        assert fit["triples_trained"] + fit["triples_held_out"] == members * (families.LAYERS - 2)
    after = families.logits(families.load_strict(result.out, family), families.tokens())
    assert torch.isfinite(after).all()

    base = families.layer_tensors(bases(family), family, 4)
    alone = grow(bases(family), lesa={**lesa, "share_experts": False})
    new = result.manifest["new_layers"][0]
    shared, separate = (families.layer_tensors(r.out, family, new) for r in (result, alone))
    for name in base:
        assert torch.equal(shared[name], separate[name]) == ("experts" not in name), name


@pytest.mark.parametrize("predictor", ["mlp", "ridge"])
def test_shared_experts_with_a_variant_and_later_rounds(
    predictor: str, bases: Bases, grow: Grow, tmp_path: Any
) -> None:
    tuned = families.make("mixtral", tmp_path / "tuned", seed=1)
    lesa = {"epochs": 1, "share_experts": True, "predictor": predictor}
    result = grow(bases("mixtral"), lesa=lesa, layers=4 * families.LAYERS, variants=[tuned], zero_init=True)
    fit = result.manifest["fit"]["block_sparse_moe.experts.*.w2.weight"]
    assert (fit["checkpoints"], fit["members"]) == (2, 4)
    assert fit["triples_trained"] + fit["triples_held_out"] == 2 * 4 * (families.LAYERS - 2)
    families.load_strict(result.out, "mixtral")


def test_each_member_is_predicted_from_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mean in the predictor's place the weights are known, exact only in a basis of all members."""
    monkeypatch.setattr("lesa_ray.lesa.predictor.Predictor.__call__", lambda self, a, b: (a + b) / 2)
    generator = torch.Generator().manual_seed(0)
    experts = [  # rank 12 each, 30 in all, and of very different sizes
        [10**e * torch.randn(30, 4, generator=generator) for _ in range(3)] for e in range(3)
    ]
    made: dict[tuple[int, int], torch.Tensor] = {}
    order: list[tuple[int, int]] = []

    def store(member: int, slot: int, weight: torch.Tensor) -> None:
        order.append((slot, member))
        made[member, slot] = weight

    loads = [lambda i, e=e: experts[e][i] for e in range(3)]
    (report,) = fit_each([Fit(loads, store, 0)], 3, [(3, 0, 1), (4, 3, 1)], QUICK)
    assert (report.members, report.rank, report.captured) == (3, 30, pytest.approx(1))
    assert order == [(slot, member) for slot in (3, 4) for member in range(3)]
    ratios = []
    for e, layers in enumerate(experts):
        first = (layers[0] + layers[1]) / 2
        second = (first + layers[1]) / 2
        for slot, weight, below in ((3, first, layers[0]), (4, second, first)):
            torch.testing.assert_close(made[e, slot], weight, atol=1e-5 * 10**e, rtol=0)
            ratios.append(float(2 * weight.norm() / (below.norm() + layers[1].norm())))
    assert report.norm_ratio == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_the_shared_predictor_learns_from_all_members() -> None:
    """One expert's triples alone do not determine the rule that all follow; ridge finds it from all of them."""
    generator = torch.Generator().manual_seed(0)
    rule = torch.randn(24, 12, generator=generator) / 5

    def expert() -> list[torch.Tensor]:
        lower, upper = (torch.randn(6, 12, generator=generator) for _ in range(2))
        return [lower, torch.cat([lower, upper], dim=1) @ rule, upper]

    experts = [expert() for _ in range(10)]
    settings = QUICK.model_copy(update={"predictor": "ridge", "ridge": 1e-4, "holdout": 0.2, "svd": "none"})
    (shared,) = fit_each([Fit([lambda i, e=e: e[i] for e in experts], lambda *_: None, 0)], 3, [], settings)
    assert shared.held_out is not None
    assert shared.held_out["predictor"].r2 == pytest.approx(1, abs=0.02)
    (alone,) = fit_each([Fit([lambda i, e=e: e[i] for e in experts[:2]], lambda *_: None, 0)], 3, [], settings)
    assert alone.held_out is not None
    assert alone.held_out["predictor"].r2 < 0.8


def test_a_base_without_experts_is_refused(bases: Bases, tmp_path: Any) -> None:
    config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), lesa={"share_experts": True})
    with pytest.raises(UserError, match=re.escape(f"--share-experts: BASE {bases('llama')} (llama) has no experts")):
        prepare(config)
