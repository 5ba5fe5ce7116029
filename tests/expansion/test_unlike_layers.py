"""Models whose layers are of several kinds: dense first ones below mixtures of experts, attention among recurrences."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lesa_ray import ExpandConfig, Expanded, UserError
from lesa_ray.checkpoint import residual
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.expansion import rehearsal
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.rehearsal import rehearse
from lesa_ray.report import terminal
from tests import families
from tests.report.printing import printed

LAYERS = {"deepseek_v3": 7, "qwen3_next": 8, "nemotron_h": 8, "jamba": 12}
DENSE = 2
"""Layers of `deepseek_v3` below those of experts."""
Grow = Callable[..., Expanded]


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def base(name: str) -> str:
        if name not in made:
            made[name] = families.make(name, tmp_path_factory.mktemp(name), layers=LAYERS[name])
        return made[name]

    return base


def config_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return found


def layer(tensors: dict[str, Tensor], index: int, stack: str = "model.layers.") -> dict[str, Tensor]:
    return {n.removeprefix(f"{stack}{index}."): t for n, t in tensors.items() if n.startswith(f"{stack}{index}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_means_are_of_the_layers_above_the_dense_ones(unlike: Callable[[str], str], grow: Grow) -> None:
    """Gaps are told as of the whole model."""
    base = unlike("deepseek_v3")
    result = grow(base, method="avg-deus", position="2,5")
    before, after = families.tensors(base), families.tensors(result.out)
    assert result.manifest["new_layers"] == [3, 7]
    assert result.layers == 9
    assert "7 → 9 layers" in (Path(result.out) / "README.md").read_text()
    assert [(record["kind"], record["base_layers"]) for record in result.manifest["layers"]] == [
        ("old", [0]),
        ("old", [1]),
        ("old", [2]),
        ("new", [2, 3]),
        ("old", [3]),
        ("old", [4]),
        ("old", [5]),
        ("new", [5, 6]),
        ("old", [6]),
    ]
    for record in result.manifest["layers"]:
        made = layer(after, record["index"])
        sources = [layer(before, source) for source in record["base_layers"]]
        if record["kind"] == "old":
            assert same(made, sources[0])
            continue
        assert made.keys() == sources[0].keys()
        for name, tensor in made.items():
            mean = torch.stack([source[name].double() for source in sources]).mean(0)
            expected = sources[0][name].double() if "mlp.gate." in name else mean  # routers keep their own order
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert {n: t for n, t in after.items() if ".layers." not in n}.keys() == {n for n in before if ".layers." not in n}
    config = config_of(result.out)
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (9, DENSE)
    families.load_strict(result.out, "deepseek_v3")


@pytest.mark.parametrize("share", [False, True])
def test_lesa_makes_what_it_makes_of_those_layers_alone(
    share: bool, unlike: Callable[[str], str], grow: Grow, tmp_path: Path
) -> None:
    """The same layers without the dense ones beneath, as a model of their own."""
    base = unlike("deepseek_v3")
    above = tmp_path / "above"
    above.mkdir()
    moved = {}
    for name, tensor in families.tensors(base).items():
        match = re.match(r"(model\.layers\.)(\d+)(\..*)", name)
        if match is None:
            moved[name] = tensor
        elif int(match[2]) >= DENSE:
            moved[f"{match[1]}{int(match[2]) - DENSE}{match[3]}"] = tensor
    save_file(moved, above / "model.safetensors")
    config = {**config_of(base), "num_hidden_layers": 5, "first_k_dense_replace": 0}
    (above / "config.json").write_text(json.dumps(config))
    settings = {"method": "lesa", "lesa": {"epochs": 1, "share_experts": share}}
    whole = grow(base, layers=10, **settings)
    alone = grow(str(above), layers=8, **settings)
    assert whole.manifest["new_layers"] == [index + DENSE for index in alone.manifest["new_layers"]] == [4, 6, 8]
    ours, theirs = families.tensors(whole.out), families.tensors(alone.out)
    for index in range(8):
        assert same(layer(ours, index + DENSE), layer(theirs, index)), index
    families.load_strict(whole.out, "deepseek_v3")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"position": "1"}, r"--position 1: gap 1 is out of range: layers below layer 2 .*gaps run from 2 to 5"),
        ({"position": "2,6"}, r"gap 6 is out of range; .* run from 0 to 5"),
        ({"position": "2,3", "layers": 10}, r"--position: names 2 gaps, and 3 layers are to be added"),
    ],
)
def test_gaps_that_are_none(settings: dict[str, Any], says: str, unlike: Callable[[str], str], tmp_path: Path) -> None:
    config = {"base": unlike("deepseek_v3"), "out": str(tmp_path / "out"), "method": "avg-deus", **settings}
    with pytest.raises(UserError, match=says):
        prepare(ExpandConfig.model_validate(config))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "nemotron_h"])
def test_copies_of_layers_of_any_kind_keep_the_function(family: str, unlike: Callable[[str], str], grow: Grow) -> None:
    base = unlike(family)
    kind = families.UNLIKE[family]
    result = grow(base, method="llama-pro", layers=LAYERS[family] + 5)
    before, after = families.tensors(base), families.tensors(result.out)
    copied = set()
    for record in result.manifest["layers"]:
        (source,) = record["base_layers"]
        made, original = (layer(t, i, kind.layer_prefix) for t, i in ((after, record["index"]), (before, source)))
        if record["kind"] == "copy":
            copied.add(frozenset(original))
            zeroed = {name for name in original if families.matches(name, kind.writes)}
            assert zeroed
            assert not any(made[name].any() for name in zeroed)
            original |= {name: torch.zeros_like(original[name]) for name in zeroed}
        assert same(made, original), record
    assert len(copied) > 1, "copies of more than one kind"
    ids = families.tokens()
    logits = [families.logits(families.load_strict(folder, kind), ids) for folder in (base, result.out)]
    assert torch.equal(*logits)


def test_stacked_layers_of_any_kind(unlike: Callable[[str], str], grow: Grow) -> None:
    result = grow(unlike("qwen3_next"), method="solar", layers=12)
    types = (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert config_of(result.out)["layer_types"] == types[:6] + types[2:]
    model = families.load_strict(result.out, "qwen3_next")
    assert torch.isfinite(families.logits(model, families.tokens())).all()


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("qwen3_next", {"method": "lesa"}, r"layers are not alike: .*; whole layers can be copied by llama-pro"),
        (
            "deepseek_v3",
            {"method": "solar", "layers": 13},
            r"first_k_dense_replace = 2: .* would lie above others; choose other",
        ),
        ("jamba", {"method": "llama-pro"}, r"by a rule .*attn_layer_period = 4, expert_layer_period = 2.* solar does"),
        ("qwen3_next", {"method": "copy", "vectors": "mean"}, r"--vectors mean: not every layer has it: .*; use"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    family: str, settings: dict[str, Any], says: str, unlike: Callable[[str], str], grow: Grow, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        grow(unlike(family), **settings)
    assert not list(tmp_path.iterdir())


def test_a_rule_is_kept_where_layers_move_by_a_whole_period(unlike: Callable[[str], str], grow: Grow) -> None:
    """The second stack of 8 layers begins 4 layers on, a period of attention and two of experts."""
    result = grow(unlike("jamba"), method="solar", layers=16)
    assert torch.isfinite(families.logits(families.load_strict(result.out, "jamba"), families.tokens())).all()


@pytest.mark.parametrize("missed", ["out_proj", "o_proj"])
def test_the_trial_has_a_layer_of_each_kind(
    missed: str, unlike: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two layers are both recurrent."""
    pattern = residual._WRITER.pattern.replace(f":{missed}|", ":").replace(f"|{missed}|", "|")
    assert pattern != residual._WRITER.pattern
    monkeypatch.setattr(residual, "_WRITER", re.compile(pattern))
    config = ExpandConfig(base=unlike("qwen3_next"), out=str(tmp_path / "out"), method="llama-pro")
    with pytest.raises(UserError, match="do not keep the function of qwen3_next"):
        rehearse(prepare(config))


def test_the_trial_of_layers_above_others_is_of_those(
    unlike: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExpandConfig(base=unlike("deepseek_v3"), out=str(tmp_path / "out"), method="avg-deus", zero_init=True)
    rehearse(prepare(config))
    monkeypatch.setattr(residual, "_WRITER", re.compile(residual._WRITER.pattern.replace("|down_proj", "")))
    with pytest.raises(UserError, match="do not keep the function of deepseek_v3"):
        rehearse(prepare(config))


def test_what_cannot_be_made_narrow_is_tried_as_it_is(
    unlike: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "narrow", lambda full: {"num_key_value_heads": 3})
    rehearse(prepare(ExpandConfig(base=unlike("qwen3_next"), out=str(tmp_path / "out"), method="llama-pro")))


def test_a_trial_without_the_layers_it_is_for_is_none(
    unlike: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the dense layers tried instead of those with experts, nothing would be known of experts."""
    monkeypatch.setattr(rehearsal, "_of_each_kind", lambda anatomy: [0, 1])
    config = ExpandConfig(base=unlike("deepseek_v3"), out=str(tmp_path / "out"), method="avg-deus", zero_init=True)
    with pytest.raises(UserError, match=r"could not be built .*its layers have no mlp\.experts"):
        rehearse(prepare(config))


@pytest.mark.parametrize("method", ["avg-deus", "llama-pro"])
def test_layers_that_predict_further_tokens_stay_above(
    method: str, unlike: Callable[[str], str], grow: Grow, tmp_path: Path
) -> None:
    """DeepSeek-V3 and GLM-4.5 have one, of other tensors, numbered on from the last layer."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = families.tensors(unlike("deepseek_v3"))
    further = {"eh_proj.weight": torch.randn(8, 8), "self_attn.o_proj.weight": torch.randn(8, 8)}
    save_file(
        {**tensors, **{f"model.layers.7.{name}": tensor for name, tensor in further.items()}},
        base / "model.safetensors",
    )
    config = {**config_of(unlike("deepseek_v3")), "num_nextn_predict_layers": 1}
    (base / "config.json").write_text(json.dumps(config))
    result = grow(str(base), method=method, layers=9)
    after = families.tensors(result.out)
    assert same(layer(after, 9), further)
    assert layer(after, 10) == {}
    assert config_of(result.out)["num_nextn_predict_layers"] == 1
    assert sum(record["kind"] == "old" for record in result.manifest["layers"]) == 7


def test_inspect_tells_of_layers_that_differ(unlike: Callable[[str], str], tmp_path: Path) -> None:
    def shown(family: str, method: str) -> tuple[str, dict[str, Any]]:
        expansion = prepare(ExpandConfig(base=unlike(family), out=str(tmp_path / "out"), method=method))
        return printed(terminal.show_expansion, expansion, 120), terminal.describe(expansion)

    text, described = shown("deepseek_v3", "avg-deus")
    assert "layers 0 to 1 have other tensors than those above, between which the new layers go" in text
    assert re.search(r"mlp\.experts\.\*\.up_proj\.weight +16 × 64 +F32 +matrix, of 8 experts", text)
    assert "avg-deus: 7 → 11 layers" in text
    assert re.search(r"2 ← 2 +3 \+ 2\|3 +4 ← 3", text)
    assert described["base"]["layers"] == 7
    assert described["base"]["other_layers_below"] == DENSE
    assert described["plan"]["outputs"][:3] == [{"old": 0}, {"old": 1}, {"old": 2}]
    text, described = shown("qwen3_next", "llama-pro")
    assert re.search(r"self_attn\.o_proj\.weight +64 × 64 +F32 +matrix \(2 of 8 layers\)", text)
    assert described["base"]["weight_types"]["self_attn.o_proj.weight"]["layers"] == 2


def test_importance_is_that_of_the_layers_above(unlike: Callable[[str], str], tmp_path: Path) -> None:
    base = unlike("deepseek_v3")
    cosines = [0.9, 0.1, 0.5, 0.2, 0.4, 0.3, 0.0]  # layer 1 does most, and 6 has no gap above it
    analysis = {
        "kind": "analysis",
        "identity": {"weights": open_checkpoint(base).digests()},
        "layers": 7,
        "residual": {"layers": [{"cosine": cosine} for cosine in cosines]},
    }
    file = tmp_path / "analysis.json"
    file.write_text(json.dumps(analysis))
    settings: dict[str, Any] = {"position": "most-important", "importance": str(file), "layers": 9}
    config = {"base": base, "out": str(tmp_path / "out"), "method": "avg-deus", **settings}
    plan = prepare(ExpandConfig.model_validate(config)).job.whole_plan
    assert sorted(slot.lower for slot in plan.slots) == [3, 5]


def test_variants_have_as_many_layers_below(unlike: Callable[[str], str], tmp_path: Path) -> None:
    tuned = families.make("deepseek_v3", tmp_path / "tuned", layers=7, seed=1)
    other = families.make("deepseek_v3", tmp_path / "other", layers=7, first_k_dense_replace=1)
    given = {"base": unlike("deepseek_v3"), "out": str(tmp_path / "out"), "method": "lesa"}
    assert len(prepare(ExpandConfig.model_validate({**given, "variants": [tuned]})).variants) == 1
    with pytest.raises(UserError, match=r"other: its layers are alike from layer 1 on, those of BASE .* from layer 2"):
        prepare(ExpandConfig.model_validate({**given, "variants": [other]}))


def test_copies_have_the_dtype_of_their_layer(unlike: Callable[[str], str], grow: Grow, tmp_path: Path) -> None:
    """Zeros too."""
    base = Path(shutil.copytree(unlike("deepseek_v3"), tmp_path / "base"))
    tensors = families.tensors(base)
    for name in tensors:
        if name.startswith("model.layers.6."):
            tensors[name] = tensors[name].bfloat16()
    save_file(tensors, base / "model.safetensors")
    result = grow(str(base), method="llama-pro", layers=9)
    after = families.tensors(result.out)
    dtypes = [{tensor.dtype for tensor in layer(after, index).values()} for index in range(9)]
    assert dtypes == [{torch.float32}] * 7 + [{torch.bfloat16}] * 2
    assert result.manifest["layers"][8]["kind"] == "copy"
