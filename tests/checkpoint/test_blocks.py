"""What lies on the private side of a layer, family by family, and the layers whose private side is not known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from lesa_ray import UserError
from lesa_ray.checkpoint.anatomy import WeightType, read_anatomy
from lesa_ray.checkpoint.blocks import Fused, read_blocks
from lesa_ray.checkpoint.reader import open_checkpoint

Bases = Callable[[str], str]


@pytest.mark.parametrize(
    ("family", "heads", "rotations"),
    [
        ("llama", (4, 2, 16), ("planes", "any")),
        ("mistral", (4, 2, 16), ("planes", "any")),
        ("qwen2", (4, 2, 16), ("planes", "any")),
        ("qwen3", (4, 2, 24), ("none", "any")),  # q_norm and k_norm act on single entries of a head
        ("gemma2", (4, 2, 16), ("planes", "any")),
        ("bert", (4, 4, 16), ("any", "any")),
        ("gpt2", (4, 4, 16), ("any", "any")),
        ("phi3", (4, 2, 16), ("planes", "any")),
        ("gpt_neox", (4, 4, 16), ("none", "any")),  # a quarter of each head is rotated
        ("pythia", (4, 4, 16), ("none", "any")),
    ],
)
def test_heads_and_what_they_may_be_turned_by(
    family: str, heads: tuple[int, int, int], rotations: tuple[str, str], bases: Bases
) -> None:
    attention, mlp = read_blocks(read_anatomy(open_checkpoint(bases(family))), "test")
    assert (attention.heads, attention.groups, attention.size) == heads
    assert (attention.query_rotation, attention.value_rotation) == rotations
    assert mlp.neurons == {"bert": mlp.neurons, "gpt2": 256}.get(family, 96)


def test_biases_on_the_private_side_follow_and_others_do_not(bases: Bases) -> None:
    attention, mlp = read_blocks(read_anatomy(open_checkpoint(bases("qwen2"))), "test")
    assert {name: part for name, part in attention.parts.items() if name.endswith("bias")} == {
        f"self_attn.{part}_proj.bias": part for part in "qkv"
    }
    assert dict(mlp.parts) == {f"mlp.{part}_proj.weight": part for part in ("gate", "up", "down")}
    attention, mlp = read_blocks(read_anatomy(open_checkpoint(bases("bert"))), "test")
    assert {name for name in (*attention.parts, *mlp.parts) if name.endswith("bias")} == {
        *(f"attention.self.{name}.bias" for name in ("query", "key", "value")),
        "intermediate.dense.bias",
    }
    assert set(mlp.parts.values()) == {"gate", "down"}


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("mixtral", "which expert of one layer"),
        ("qwen3_moe", "which expert of one layer"),
    ],
)
def test_what_cannot_be_matched_is_refused_in_one_line(family: str, why: str, bases: Bases) -> None:
    with pytest.raises(UserError, match=why) as refusal:
        read_blocks(read_anatomy(open_checkpoint(bases(family))), "analyze")
    assert str(refusal.value).startswith("analyze: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("family", "name"), [("gpt2", "attn.c_attn"), ("gpt_neox", "attention.query_key_value"),
                                             ("phi3", "self_attn.qkv_proj")])  # fmt: skip
def test_fused_projections_of_an_unknown_family_are_refused(family: str, name: str, bases: Bases) -> None:
    """In which order their rows lie cannot be told."""
    anatomy = dataclasses.replace(read_anatomy(open_checkpoint(bases(family))), family="novel")
    with pytest.raises(UserError, match=f"{name}.weight is none of query, key, value and output, or several of them"):
        read_blocks(anatomy, "test")


def test_fused_projections_are_told_apart(bases: Bases) -> None:
    attention, mlp = read_blocks(read_anatomy(open_checkpoint(bases("phi3"))), "test")
    assert attention.parts["self_attn.qkv_proj.weight"] == Fused(("q", "k", "v"), (64, 32, 32), 1)
    fused = attention.parts["self_attn.qkv_proj.weight"]
    assert isinstance(fused, Fused)
    assert [one.tolist() for _, one in fused.split(torch.arange(128))] == [
        [*range(64)], [*range(64, 96)], [*range(96, 128)]
    ]  # fmt: skip
    assert mlp.parts["mlp.gate_up_proj.weight"] == Fused(("gate", "up"), (96, 96), 1)
    attention, _ = read_blocks(read_anatomy(open_checkpoint(bases("gpt_neox"))), "test")
    fused = attention.parts["attention.query_key_value.bias"]
    assert fused == Fused(("q", "k", "v"), (64, 64, 64), 4)
    assert isinstance(fused, Fused)
    rows = torch.arange(192)
    split = dict(fused.split(rows))
    assert split["k"][:17].tolist() == [*range(16, 32), 64]  # the first head's keys, then the second's
    assert torch.equal(fused.joined(split.values()), rows)


@pytest.mark.parametrize(
    ("changes", "extra", "why"),
    [
        ({"num_attention_heads": 3}, (), "are not 3 heads of one size"),
        ({"num_attention_heads": None}, (), "does not say num_attention_heads"),
        ({}, (("self_attn.sinks", (4,)),), r"what self_attn.sinks \[4\] belongs to is not known"),
        ({}, (("mlp.ffn_norm.weight", (96,)),), r"what mlp.ffn_norm.weight \[96\] belongs to is not known"),
        ({}, (("layer_scale", (64,)),), r"what layer_scale \[64\] belongs to is not known"),
        ({}, (("self_attn.bias_proj.weight", (4, 64)),), "self_attn.bias_proj.weight is none of query"),
        ({}, (("mlp.gate_up_proj.weight", (192, 64)),), "mlp.gate_up_proj.weight has 192 rows for 96 neurons"),
    ],
)
def test_an_unknown_tensor_on_the_private_side_is_refused(
    changes: dict[str, object], extra: tuple[tuple[str, tuple[int, ...]], ...], why: str, bases: Bases
) -> None:
    anatomy = read_anatomy(open_checkpoint(bases("llama")))
    types = dict(anatomy.types)
    for name, shape in extra:
        types[name] = WeightType(name, shape, "F32", "vector" if len(shape) == 1 else "matrix")
    changed = dataclasses.replace(anatomy, types=types, config={**anatomy.config, **changes})
    with pytest.raises(UserError, match=why):
        read_blocks(changed, "test")


@pytest.mark.parametrize(
    "changes",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ],
)
def test_partly_rotary_heads_are_not_turned(changes: dict[str, object], bases: Bases) -> None:
    anatomy = read_anatomy(open_checkpoint(bases("llama")))
    attention, _ = read_blocks(dataclasses.replace(anatomy, config={**anatomy.config, **changes}), "test")
    assert (attention.query_rotation, attention.value_rotation) == ("none", "any")


def test_an_unknown_family_keeps_its_heads_as_they_are(bases: Bases) -> None:
    anatomy = read_anatomy(open_checkpoint(bases("llama")))
    attention, _ = read_blocks(dataclasses.replace(anatomy, family="novel"), "test")
    assert (attention.query_rotation, attention.value_rotation) == ("none", "none")


def test_layers_with_heads_of_their_own_are_read_as_the_widest(bases: Bases) -> None:
    anatomy = read_anatomy(open_checkpoint(bases("llama")))
    config = {**anatomy.config, "num_attention_heads": 2, "num_attention_heads_per_layer": [2, 4, 3]}
    attention, _ = read_blocks(dataclasses.replace(anatomy, config=config), "test")
    assert (attention.heads, attention.groups, attention.size) == (4, 2, 16)
