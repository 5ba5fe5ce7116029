"""The total is met, and what cannot be met is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lesa_ray.config import load_settings
from lesa_ray.errors import UserError
from lesa_ray.layerwise.budget import MULTIPLES, Frame, Solved
from lesa_ray.layerwise.profiles import PROFILES
from lesa_ray.layerwise.settings import LayerwiseConfig, architecture, sizes_of
from lesa_ray.training.model import build


def settings(**given: Any) -> LayerwiseConfig:
    return load_settings(LayerwiseConfig, None, **{"out": "unused", **given})


def solved(**given: Any) -> Solved:
    return sizes_of(settings(**given))


@pytest.mark.parametrize("layers", [12, 18])
@pytest.mark.parametrize("profile", list(PROFILES))
def test_the_papers_budget_is_met(profile: str, layers: int) -> None:
    """Counted on the model itself, built without weights."""
    config = settings(profile=profile, layers=layers, params="180M")
    sizes = sizes_of(config).sizes
    model = build(architecture(config), "here")
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert abs(sizes.parameters / 180e6 - 1) <= 0.005
    assert all(heads % 4 == 0 for heads in sizes.heads)
    assert set(sizes.kv_heads) == {4}
    for index, layer in enumerate(model.model.layers):
        assert layer.mlp.gate_proj.weight.shape == (sizes.widths[index], 768)
        assert layer.self_attn.q_proj.weight.shape == (64 * sizes.heads[index], 768)
        assert sum(p.numel() for p in layer.parameters()) == sizes.layer_parameters(index)
    if profile == "isotropic":
        assert len(set(sizes.widths)) == 1


def test_no_scale_comes_nearer() -> None:
    """Against a fine grid of scales."""
    frame = Frame(PROFILES["crown"], 7, 64, 16, 2, 300, True)
    totals = [frame.sizes(step / 500, 8).parameters for step in range(2500)]
    assert totals == sorted(totals)
    assert len(set(totals)) > 100
    for wanted in (223_456, 261_500, 301_000):
        found = solved(profile="crown", layers=7, d_model=64, head_dim=16, kv_heads=2, vocab_size=300, tied=True,
                       multiple=8, params=wanted)  # fmt: skip
        nearest = min(totals, key=lambda total: abs(total - wanted))
        assert abs(found.sizes.parameters - wanted) <= abs(nearest - wanted)
        assert frame.sizes(found.scale, 8) == found.sizes


def test_the_multiple_is_the_largest_that_meets_the_budget() -> None:
    coarse = solved(profile="vanilla", params="180M")
    fine = solved(profile="isotropic", layers=12, params="180M")
    assert (coarse.multiple, fine.multiple) == (256, 64)
    for found in (coarse, fine):
        assert all(width % found.multiple == 0 for width in found.sizes.widths)
    for larger in MULTIPLES[: MULTIPLES.index(64)]:
        with pytest.raises(UserError, match=f"multiples of {larger} has .*give a smaller multiple"):
            solved(profile="isotropic", layers=12, params="180M", multiple=larger)


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_what_is_a_hundredth_off_on_either_side_is_refused(share: float) -> None:
    """Of equal layers all widths step together: the profile's own model has the nearest number."""
    given = {"profile": "isotropic", "layers": 12, "multiple": 256}
    own = solved(**given).sizes.parameters
    with pytest.raises(UserError, match=f"the nearest with widths that are multiples of 256 has {own:,}, "):
        solved(**given, params=round(share * own))


def test_without_a_budget_the_profile_is_as_it_is() -> None:
    assert solved(profile="vanilla").sizes.widths[0] == 768
    assert solved(profile="vanilla").sizes.widths[-1] == 3072
    assert set(solved(profile="vanilla", beta="2").sizes.widths) == {1536}
    assert solved(alpha=("0.5", "1.0")).sizes.heads == solved(alpha="0.5,1").sizes.heads


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"params": "60M"}, r"params 60,000,000: too few for 18 layers of d_model 768 .*102,067,968 without any FFN"),
        ({"kv_heads": 5}, r"kv_heads 5: do not divide the 12 heads of a whole layer .*give one of 1, 2, 3, 4, 6, 12$"),
        ({"head_dim": 100}, r"d_model 768: is no whole number of heads of 100"),
        ({"head_dim": 3}, r"head_dim 3: rotary embeddings need an even one"),
        ({"beta": "-1,4"}, r"beta -1,4: gives layers widths of zero or below"),
        ({"alpha": "0.5,0"}, r"alpha 0.5,0: gives layers numbers of heads of zero or below"),
        ({"beta": "0.001,0.002", "params": "1B"}, r"beta 0.001,0.002: is rounded to two decimals .* widths of zero"),
        ({"beta": "0.004,4"}, r"beta 0.004,4: is rounded to two decimals"),
        ({"alpha": "0.002,1"}, r"alpha 0.002,1: is rounded to two decimals and gives layers numbers of heads of zero"),
        ({"profile": "framed", "beta": "0.001,0.001"}, r"beta 0.001,0.001: is rounded"),
        ({"beta": "1,2,3,4"}, r"beta 1,2,3,4: give one value, two .* or three"),
        ({"profile": "crown", "layers": 2}, r"needs? three"),
        ({"beta": "1,2,3", "layers": 2}, r"beta 1,2,3: three knots need three layers, there are 2"),
        ({"profile": "framed", "layers": 2}, r"layers 2: a framed profile needs three"),
        ({"preset": "crown"}, r"preset crown: unknown; there are isotropic-12, "),
        ({"preset": "crown-18", "params": "1M"}, r"preset crown-18 decides params; leave one of the two out"),
        ({"recipe": "paper"}, r"recipe: .*give a preset"),
        ({"eos_token_id": 50_304}, r"eos_token_id 50304: the vocabulary has 50304 entries, from 0"),
        ({"params": "many"}, r"params: 'many': give a number such as 180M"),
    ],
)
def test_what_makes_no_model_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        solved(**given)
    assert "\n" not in str(refused.value)


def test_a_frame_makes_up_for_what_is_rounded_to_zero_there() -> None:
    widths = solved(profile="framed", beta="0.001,4", params="180M").sizes.widths
    assert widths[0] == widths[-1] == 3072


def test_tied_embeddings_count_once() -> None:
    config = settings(preset="framed-18", vocab_size=1000, tied=True)
    model = build(architecture(config), "here")
    assert sizes_of(config).sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
