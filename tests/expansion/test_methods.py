"""Every method of the registry on every family: the result loads, is what was published, and is the same again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lesa_ray import Expanded, UserError
from lesa_ray.expansion.registry import METHODS
from lesa_ray.expansion.transport import Role, fuse_layer
from tests import families

FAMILIES = list(families.FAMILIES)
L = families.LAYERS
Grow = Callable[..., Expanded]
SHORT: dict[bool, dict[str, Any]] = {True: {"lesa": {"epochs": 1}}, False: {}}
MATCHED = tuple(name for name in families.FAMILIES if name not in ("mixtral", "qwen3_moe"))
"""The families whose layers can be matched."""
FEW = {
    "aligned-lesa": ("qwen2", "gpt_neox"),
    "mean-aligned": ("phi3", "gpt2", "bert"),
    "random": ("gpt2", "mixtral", "bert"),
    "copy": ("gpt2", "gemma2"),
}
"""Where a method's code does not differ from family to family, some stand for all; another method is tried on all."""
Bases = Callable[[str], str]


def cases(wanted: list[str]) -> list[tuple[str, str]]:
    """Families and methods to try on each other."""
    return [(family, method) for method in METHODS for family in wanted if family in FEW.get(method, wanted)]


def settings_for(method: str, family: str) -> dict[str, Any]:
    """Short training; BERT cannot keep its function, so the methods that promise it are told not to."""
    settings: dict[str, Any] = {"method": method, **SHORT[METHODS[method].predicts]}
    if METHODS[method].zero_init and not families.FAMILIES[family].keeps_function:
        settings["zero_init"] = False
    return settings


@pytest.mark.parametrize(("family", "method"), cases(FAMILIES))
def test_every_method_on_every_family_loads_and_runs(family: str, method: str, bases: Bases, grow: Grow) -> None:
    base = bases(family)
    result = grow(base, **settings_for(method, family))
    assert result.layers == int(L * 1.5 + 0.5)
    before = families.logits(families.load_strict(base, family), families.tokens())
    after = families.logits(families.load_strict(result.out, family), families.tokens())
    assert torch.isfinite(after).all()
    assert after.shape == before.shape
    keeps = METHODS[method].zero_init and families.FAMILIES[family].keeps_function
    assert torch.equal(before, after) == keeps


@pytest.mark.parametrize("method", list(METHODS))
def test_old_layers_are_the_bases_bytes(method: str, bases: Bases, grow: Grow) -> None:
    base = bases("llama")
    result = grow(base, **settings_for(method, "llama"))
    for record in result.manifest["layers"]:
        if record["kind"] == "old":
            old = families.layer_tensors(base, "llama", record["base_layers"][0])
            now = families.layer_tensors(result.out, "llama", record["index"])
            assert old.keys() == now.keys()
            assert all(torch.equal(old[name], now[name]) for name in old)
    outside = [name for name in families.tensors(base) if ".layers." not in name]
    assert outside
    assert all(torch.equal(families.tensors(base)[n], families.tensors(result.out)[n]) for n in outside)


@pytest.mark.parametrize(
    ("family", "method"), [*cases(["llama", "gpt2", "mixtral"]), ("llama", "aligned-lesa"), ("llama", "mean-aligned")]
)
def test_the_same_command_gives_the_same_bytes(family: str, method: str, bases: Bases, grow: Grow) -> None:
    first, second = (grow(bases(family), **settings_for(method, family)) for _ in range(2))
    one, two = ({f.name: f.read_bytes() for f in Path(r.out).iterdir()} for r in (first, second))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.parametrize("family", [name for name in FAMILIES if families.FAMILIES[name].keeps_function])
@pytest.mark.parametrize("method", ["lesa", "avg-deus", "solar"])
def test_zero_init_keeps_the_function_with_any_method(family: str, method: str, bases: Bases, grow: Grow) -> None:
    result = grow(bases(family), method=method, zero_init=True, **SHORT[method == "lesa"])
    before = families.logits(families.load_strict(bases(family), family), families.tokens())
    after = families.logits(families.load_strict(result.out, family), families.tokens())
    assert torch.equal(before, after)
    new = families.layer_tensors(result.out, family, result.manifest["new_layers"][0])
    writers = [name for name in new if families.matches(name, families.FAMILIES[family].writes)]
    assert writers
    assert all(not new[name].any() for name in writers)
    assert any(new[name].any() for name in new)


def test_bert_cannot_keep_its_function_and_says_so(bases: Bases, grow: Grow, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not keep the function of bert"):
        grow(bases("bert"), method="llama-pro", out=str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("layers", [L * 2, L * 3, L * 4])
@pytest.mark.parametrize("method", ["lesa", "llama-pro", "avg-deus", "opt-deus"])
def test_more_new_layers_than_gaps(method: str, layers: int, bases: Bases, grow: Grow) -> None:
    result = grow(bases("llama"), method=method, layers=layers, **SHORT[method == "lesa"])
    model = families.load_strict(result.out, "llama")
    assert model.config.num_hidden_layers == layers
    after = families.logits(model, families.tokens())
    if METHODS[method].zero_init:
        assert torch.equal(after, families.logits(families.load_strict(bases("llama"), "llama"), families.tokens()))
    assert torch.isfinite(after).all()


def test_llama_pro_is_the_published_mapping(bases: Bases, grow: Grow) -> None:
    """github.com/TencentARC/LLaMA-Pro, scripts/block_expansion.py, on every tensor."""
    base = families.tensors(families.make("llama", Path(bases("llama")).parent / "six", layers=6))
    result = families.tensors(grow(str(Path(bases("llama")).parent / "six"), method="llama-pro", layers=9).out)
    expected, count = {}, 0
    for layer in range(6):
        mine = {name: t for name, t in base.items() if f".layers.{layer}." in name}
        expected |= {name.replace(f".{layer}.", f".{count}.", 1): t for name, t in mine.items()}
        count += 1
        if (layer + 1) % 2 == 0:  # split = 6 / (9 - 6)
            for name, tensor in mine.items():
                zero = "o_proj" in name or "down_proj" in name
                expected[name.replace(f".{layer}.", f".{count}.", 1)] = torch.zeros_like(tensor) if zero else tensor
            count += 1
    expected |= {name: t for name, t in base.items() if ".layers." not in name}
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_solar_is_the_published_mapping(bases: Bases, grow: Grow) -> None:
    """arXiv 2312.15166: layers [0, L-m) then [m, L), m = L - T/2; 6 → 8: 0 1 2 3 2 3 4 5."""
    six = str(Path(bases("llama")).parent / "six-solar")
    base = families.tensors(families.make("llama", six, layers=6))
    result = families.tensors(grow(six, method="solar", layers=8).out)
    expected = {name: t for name, t in base.items() if ".layers." not in name}
    for new, old in enumerate([0, 1, 2, 3, 2, 3, 4, 5]):
        mine = {name: t for name, t in base.items() if f".layers.{old}." in name}
        expected |= {name.replace(f".{old}.", f".{new}.", 1): t for name, t in mine.items()}
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("vectors", ["lower", "mean", "first"])
@pytest.mark.parametrize("method", ["lesa", "avg-deus", "opt-deus", "llama-pro"])
def test_vectors_come_from_where_they_should(method: str, vectors: str, bases: Bases, grow: Grow) -> None:
    base = bases("qwen2")  # has biases
    result = grow(base, method=method, vectors=vectors, zero_init=False, **SHORT[method == "lesa"], position="top")
    record = next(r for r in result.manifest["layers"] if r["kind"] != "old")
    lower = record["index"] - 1 if method == "llama-pro" else record["neighbours"][0]
    near = [families.layer_tensors(result.out, "qwen2", i) for i in (lower, record["index"] + 1)]
    new = families.layer_tensors(result.out, "qwen2", record["index"])
    first = families.layer_tensors(base, "qwen2", 0)
    checked = 0
    for name, tensor in new.items():
        if tensor.ndim == 1:
            mean = (near[0][name].double() + near[1][name].double()) / 2
            wanted = {"lower": near[0][name], "first": first[name], "mean": mean.float()}[vectors]
            torch.testing.assert_close(tensor, wanted, rtol=1e-7, atol=0)
            checked += 1
    assert checked == 5  # two norms, three biases


def test_avg_deus_is_the_mean_of_the_neighbours(bases: Bases, grow: Grow) -> None:
    result = grow(bases("gpt2"), method="avg-deus", position="1,3")
    for record in result.manifest["layers"]:
        if record["kind"] == "new":
            below, above = (families.layer_tensors(result.out, "gpt2", i) for i in record["neighbours"])
            for name, tensor in families.layer_tensors(result.out, "gpt2", record["index"]).items():
                mean = (below[name].double() + above[name].double()) / 2
                torch.testing.assert_close(tensor, mean.to(tensor.dtype), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "recipe", "norm_before_mlp"),
    [("llama", "released-code", "post_attention_layernorm"), ("gemma2", "paper", "pre_feedforward_layernorm")],
)
def test_opt_deus_moves_the_lower_neighbour_to_the_upper_by_the_roles_of_its_tensors(
    family: str, recipe: str, norm_before_mlp: str, bases: Bases, grow: Grow
) -> None:
    """Roles by hand; what they do is tried where the arithmetic is."""
    result = grow(bases(family), method="opt-deus", position="1", zero_init=False, recipe=recipe)
    lower, new, upper = (families.layer_tensors(result.out, family, i) for i in (1, 2, 3))
    roles = {
        **{f"self_attn.{n}_proj.weight": Role.ATTENTION_INPUT for n in "qkv"},
        "self_attn.o_proj.weight": Role.ATTENTION_OUTPUT,
        **{f"mlp.{n}_proj.weight": Role.MLP_INPUT for n in ("gate", "up")},
        "mlp.down_proj.weight": Role.MLP_OUTPUT,
        **{n: Role.OTHER_VECTOR for n in lower if "norm" in n},
        f"{norm_before_mlp}.weight": Role.NORM_BEFORE_MLP,
    }
    assert roles.keys() == new.keys()
    for vector in (n for n in roles if "norm" in n):  # all ones as they are made: no order would show
        assert bool((lower[vector] != upper[vector]).any()), vector
    expected = fuse_layer(lower, upper, roles, divide_marginals=recipe == "paper").tensors
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lesa", "aligned-lesa"])
def test_what_is_trained_follows_the_seed(method: str, bases: Bases, grow: Grow) -> None:
    made = [
        grow(bases("llama"), method=method, layers=L + 1, lesa={"epochs": 1, "holdout": 0}, seed=seed)
        for seed in (0, 1)
    ]
    one, two = (families.layer_tensors(r.out, "llama", r.manifest["new_layers"][0]) for r in made)
    for name, tensor in one.items():
        assert torch.equal(two[name], tensor) == (tensor.ndim == 1), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_converts_every_float_tensor(dtype: str, bases: Bases, grow: Grow) -> None:
    result = grow(bases("llama"), method="avg-deus", dtype=dtype)
    wanted = getattr(torch, dtype)
    base, now = families.tensors(bases("llama")), families.tensors(result.out)
    assert {t.dtype for t in now.values()} == {wanted}
    name = "model.embed_tokens.weight"
    assert torch.equal(now[name], base[name].to(wanted))
    assert families.load_strict(result.out, "llama", dtype="auto").dtype == wanted


def test_shards_keep_to_the_size(bases: Bases, grow: Grow) -> None:
    result = grow(bases("llama"), method="solar", shard_size="100KB")
    files = sorted(Path(result.out).glob("*.safetensors"))
    assert len(files) > 5
    assert all(f.stat().st_size <= 100_000 + 4096 for f in files)
    families.load_strict(result.out, "llama")


def test_gemma_2_old_layers_keep_their_attention(bases: Bases, grow: Grow) -> None:
    """The alternation by index is spelled out, also where config.json leaves it to the configuration class."""
    import json

    base = Path(bases("gemma2"))
    bare = base.parent / "gemma2-bare"
    bare.mkdir(exist_ok=True)
    for file in base.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    config = json.loads((bare / "config.json").read_text())
    types = config.pop("layer_types")
    (bare / "config.json").write_text(json.dumps(config))
    result = grow(str(bare), method="llama-pro", layers=L + 1)
    grown = json.loads((Path(result.out) / "config.json").read_text())["layer_types"]
    assert [grown[r["index"]] for r in result.manifest["layers"] if r["kind"] == "old"] == types
    before = families.logits(families.load_strict(bare, "gemma2"), families.tokens())
    assert torch.equal(before, families.logits(families.load_strict(result.out, "gemma2"), families.tokens()))
