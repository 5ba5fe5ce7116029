"""Layers and weight types read off tensor names, family by family, and the layouts that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lesa_ray import UserError
from lesa_ray.checkpoint.anatomy import Anatomy, Differ, WeightType, read_anatomy
from lesa_ray.checkpoint.names import layer_of
from lesa_ray.checkpoint.reader import Checkpoint, open_checkpoint
from lesa_ray.checkpoint.settings import config_depth
from tests import families

Bases = Callable[[str], str]


def anatomy_of(folder: str | Path) -> Anatomy:
    return read_anatomy(open_checkpoint(str(folder)))


def checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], **config: object) -> Path:
    """A checkpoint with these tensors and this configuration."""
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_a_name_is_taken_apart_and_put_together(family: str, bases: Bases) -> None:
    anatomy = anatomy_of(bases(family))
    names = set(families.tensors(bases(family)))
    inside = {anatomy.name(layer, t) for layer in range(anatomy.layers) for t in anatomy.types}
    assert inside | set(anatomy.outside) == names
    assert not inside & set(anatomy.outside)
    assert all(layer_of(anatomy.name(layer, t)) == layer for layer in range(anatomy.layers) for t in anatomy.types)
    assert {layer_of(name) for name in anatomy.outside} <= {None}
    assert anatomy.layers == families.LAYERS
    assert anatomy.stack == families.FAMILIES[family].layer_prefix


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_matrices_are_linear_layers_with_outputs_times_inputs(family: str, bases: Bases) -> None:
    """transformers' own modules say how many inputs and outputs each has."""
    model = families.FAMILIES[family].auto.from_pretrained(bases(family))
    anatomy = anatomy_of(bases(family))
    found = 0
    for name, module in model.named_modules():
        for weight_type in anatomy.matrices:
            stem = weight_type.name.removesuffix(".weight")
            if name.endswith(f".0.{stem}") and hasattr(module, "weight"):
                if isinstance(module, torch.nn.Linear):
                    expected = (module.out_features, module.in_features)
                else:
                    expected = (module.nf, module.nx)  # Conv1D
                assert (weight_type.d1, weight_type.d2) == expected, weight_type
                found += 1
    experts = any(t.is_expert for t in anatomy.matrices)
    assert found == len([t for t in anatomy.matrices if not t.is_expert])
    assert experts == ("moe" in family or family == "mixtral")


@pytest.mark.parametrize(("family", "router"), [("mixtral", "gate.weight"), ("qwen3_moe", "mlp.gate.weight")])
def test_routers_are_no_matrices(family: str, router: str, bases: Bases) -> None:
    routers = [t.name for t in anatomy_of(bases(family)).types.values() if t.kind == "router"]
    assert len(routers) == 1
    assert routers[0].endswith(router)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("module", ["mlp.", "block_sparse_moe."])
def test_what_has_an_entry_for_each_expert_is_the_routers(module: str, fused: bool, tmp_path: Path) -> None:
    """Hunyuan nests its gate, DeepSeek 3, MiniMax and Ernie 4.5 correct its choice by vectors."""
    experts = 3
    routers: dict[str, tuple[int, ...]] = {
        f"{module}gate.wg.weight": (experts, 8),
        f"{module}gate.weight": (experts, 8),
        f"{module}gate.e_score_correction_bias": (experts,),
        f"{module}e_score_correction_bias": (experts,),
        f"{module}moe_statics.e_score_correction_bias": (1, experts),
    }
    others: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (experts, 8),
        "norm.weight": (experts,),
        f"{module}norm.weight": (8,),
        f"{module}shared_expert.up_proj.weight": (experts, 8),
        f"{module}shared_expert_gate.weight": (1, 8),
    }
    single = {f"{module}experts.{number}.up.weight": (experts, 8) for number in range(experts)}
    shapes = {**routers, **others, **({f"{module}experts.up": (experts, 8, 8)} if fused else single)}
    anatomy = anatomy_of(
        checkpoint(tmp_path, {f"layers.0.{name}": shape for name, shape in shapes.items()}, num_hidden_layers=1)
    )
    assert {name for name, t in anatomy.types.items() if t.kind == "router"} == set(routers)
    assert {t.name for t in anatomy.vectors} == {"norm.weight", f"{module}norm.weight"}


def test_experts_of_a_kind_share_a_name(bases: Bases) -> None:
    anatomy = anatomy_of(bases("qwen3_moe"))
    experts = [t.name for t in anatomy.matrices if "experts." in t.name]
    gates = anatomy.kinds["mlp.experts.*.gate_proj.weight"]
    assert [t.expert for t in gates] == list(range(len(gates)))
    assert [t.name for t in gates] == [f"mlp.experts.{number}.gate_proj.weight" for number in range(len(gates))]
    assert anatomy.kinds["self_attn.q_proj.weight"] == (anatomy.types["self_attn.q_proj.weight"],)
    assert sum(len(types) for types in anatomy.kinds.values()) == len(anatomy.matrices)
    assert len(experts) == 3 * len(gates) > 3
    shared = WeightType("mlp.shared_experts.0.up_proj.weight", (4, 4), "F32", "matrix")
    assert (shared.expert, shared.of_its_kind) == (None, shared.name)


def test_a_square_matrix_beside_no_experts_is_no_router(bases: Bases) -> None:
    kinds = {t.name: t.kind for t in anatomy_of(bases("llama")).types.values()}
    assert kinds["mlp.gate_proj.weight"] == "matrix"
    assert kinds["input_layernorm.weight"] == "vector"


@pytest.mark.parametrize(
    ("shapes", "config", "says"),
    [
        ({"embed.weight": (2, 2)}, {}, "no layers found; tensors named like embed.weight"),
        ({"encoder.layers.0.w": (2, 2), "decoder.layers.0.w": (2, 2)}, {}, "has 2 stacks of layers"),
        ({"layers.0.w": (2, 2), "layers.2.w": (2, 2)}, {}, r"layer layers.1 is missing, though there is a layer 2"),
        ({"layers.0.w": (2, 2), "layers.1.v": (2, 2)}, {}, "layers are not alike"),
        (
            {"layers.0.w": (2,), "layers.1.w": (2,), "layers.1.v": (2,)},
            {"n_layer": 2},
            r"layers are not alike: layers.1.v has no counterpart in layer 0",
        ),
        (
            {"layers.0.w": (2, 2), "layers.1.w": (2, 3)},
            {},
            r"layers.1.w is F32 \[2, 3\], in layer 0 it is F32 \[2, 2\]",
        ),
        ({"layers.0.w": (2, 2)}, {}, "config.json has none of num_hidden_layers"),
        ({"layers.0.w": (2, 2)}, {"n_layer": 2}, "config.json says n_layer = 2, the files hold 1 layers"),
    ],
)
def test_layouts_that_are_refused(
    shapes: dict[str, tuple[int, ...]], config: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        anatomy_of(checkpoint(tmp_path, shapes, **config))


def test_layers_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {}, n_layer=2)
    tensors = {"layers.0.w": torch.zeros(2, 2), "layers.1.w": torch.zeros(2, 2, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.w is BF16 \[2, 2\], in layer 0 it is F32 \[2, 2\]"):
        anatomy_of(folder)


Shapes = dict[str, tuple[int, ...]]
DENSE: Shapes = {"norm": (4,), "mlp.w": (8, 4)}
EXPERTS: Shapes = {"norm": (4,), "mlp.experts.0.w": (6, 4), "mlp.experts.1.w": (6, 4)}


def stacked(folder: Path, *layers: Shapes, depth: int | None = None, **config: object) -> Checkpoint:
    """A checkpoint of layers with tensors of these shapes. depth: as config.json says it; None: all."""
    shapes = {f"layers.{at}.{name}": shape for at, layer in enumerate(layers) for name, shape in layer.items()}
    depth = len(layers) if depth is None else depth
    return open_checkpoint(str(checkpoint(folder, {**shapes, "embed.weight": (2, 2)}, n_layer=depth, **config)))


def test_layers_below_those_that_are_alike(tmp_path: Path) -> None:
    opened = stacked(tmp_path, DENSE, DENSE, EXPERTS, EXPERTS, EXPERTS)
    anatomy = read_anatomy(opened, differ="below")
    assert (anatomy.below, anatomy.layers, anatomy.depth, anatomy.own) == (2, 3, 5, None)
    assert anatomy.name(0, "norm") == "layers.2.norm"
    assert set(anatomy.types) == set(EXPERTS)
    below = {f"layers.{layer}.{name}" for layer in (0, 1) for name in DENSE}
    assert set(anatomy.outside) == below | {"embed.weight"}


@pytest.mark.parametrize("below", [2, 3])
def test_only_fewer_than_half_count_as_below(below: int, tmp_path: Path) -> None:
    """Elsewhere what happens to be alike at the top is no stack to grow."""
    opened = stacked(tmp_path, *[DENSE] * below, *[EXPERTS] * 2)
    with pytest.raises(UserError, match=r"layers\.\d\.mlp\..* has no counterpart in layer 0; do this"):
        read_anatomy(opened, differ="below", hint="; do this")


def test_layers_alike_have_none_below(tmp_path: Path) -> None:
    anatomy = read_anatomy(stacked(tmp_path, DENSE, DENSE, DENSE), differ="below")
    assert (anatomy.below, anatomy.layers) == (0, 3)


def test_layers_of_another_dtype_count_as_others(tmp_path: Path) -> None:
    opened = stacked(tmp_path, DENSE, DENSE, DENSE)
    tensors = {name: opened.read(name) for name in opened.tensors}
    tensors["layers.0.mlp.w"] = tensors["layers.0.mlp.w"].bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_anatomy(open_checkpoint(str(tmp_path)), differ="below").below == 1


def test_a_last_layer_of_its_own_kind_is_no_stack(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layers are not alike"):
        read_anatomy(stacked(tmp_path, DENSE, DENSE, DENSE, EXPERTS), differ="below")


def test_layers_that_differ_in_anything(tmp_path: Path) -> None:
    anatomy = read_anatomy(stacked(tmp_path, DENSE, EXPERTS, {**DENSE, "mlp.w": (12, 4)}), differ="tensors")
    assert (anatomy.below, anatomy.layers) == (0, 3)
    assert anatomy.own == (frozenset(DENSE), frozenset(EXPERTS), frozenset(DENSE))
    assert [t.name for t in anatomy.types_of(1)] == ["norm", "mlp.experts.0.w", "mlp.experts.1.w"]
    assert anatomy.types["mlp.w"].shape == (8, 4)
    with pytest.raises(UserError, match=r"has no counterpart in layer 0; models whose layers differ are not supported"):
        anatomy_of(tmp_path)


@pytest.mark.parametrize("differ", ["nothing", "below", "shapes", "tensors"])
def test_layers_that_predict_further_tokens_are_outside(differ: Differ, tmp_path: Path) -> None:
    further = {"norm": (4,), "eh_proj.w": (4, 8)}
    opened = stacked(tmp_path, DENSE, DENSE, DENSE, further, depth=3, num_nextn_predict_layers=1)
    anatomy = read_anatomy(opened, differ=differ)
    assert (anatomy.layers, anatomy.depth, set(anatomy.types)) == (3, 3, set(DENSE))
    assert set(anatomy.outside) == {"layers.3.norm", "layers.3.eh_proj.w", "embed.weight"}


def test_further_layers_that_are_not_told_of(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json says n_layer = 3, the files hold 5 layers"):
        read_anatomy(stacked(tmp_path, *[DENSE] * 5, depth=3, num_nextn_predict_layers=1))


@pytest.mark.parametrize("stack", ["mtp.layers", "model.mtp.layers"])
def test_a_stack_of_such_layers_is_outside(stack: str, tmp_path: Path) -> None:
    shapes: Shapes = {"model.layers.0.w": (2, 2), "model.layers.1.w": (2, 2), f"{stack}.0.w": (2, 2)}
    anatomy = anatomy_of(checkpoint(tmp_path, shapes, n_layer=2))
    assert (anatomy.stack, anatomy.layers, anatomy.outside) == ("model.layers.", 2, (f"{stack}.0.w",))


def test_depth_as_the_length_of_a_list() -> None:
    assert config_depth({"layers_block_type": ["mamba", "mlp"]}) == ("layers_block_type", 2)
    assert config_depth({"layers_block_type": ["mamba", "mlp"], "n_layer": 3}) == ("n_layer", 3)
